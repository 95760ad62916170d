"""The steering helpers: what the library gives for what is done by hand, and what is said where nothing can be defended."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.steering.comparison import zones
from helpers import model, prompts, steering
from helpers.model import Study

WHY = NotDefined("the prompt set has no harmful request")


@pytest.fixture(scope="module")
def study() -> Study:
    return model.begin("embedded", "embedded", "embedded", pairs=10)


@pytest.fixture(scope="module")
def lab(study: Study) -> steering.Lab:
    return replace(steering.label_prompts(study, "embedded"), said={})


def residuals(study: Study, text: str) -> torch.Tensor:
    late = zones(study.subject.n_layers)["late"]
    with torch.no_grad(), model.record_outputs({at: study.subject.layers[at].block for at in late}) as seen:
        study.subject.model(prompts.chat_tokens(study, text))
    return torch.stack([seen[at][0, -1] for at in late])


def test_directions_by_hand_are_the_librarys_also_where_there_are_none(study: Study, lab: steering.Lab, capsys) -> None:
    asked = steering.requests(study, lab)
    assert not capsys.readouterr().out and set(asked.columns) >= {"text", "refused"}
    practice = steering.requests(study, WHY)
    assert "for practice only: the prompt set has no" in capsys.readouterr().out and practice.refused.mean() == 0.5
    for table, found in ((asked, lab), (practice, WHY)):
        means = [
            torch.stack([residuals(study, text) for text in table.text[table.refused == is_refused]]).mean(0)
            for is_refused in (True, False)
        ]
        library = steering.rejection_directions(study, found, table)
        assert (means[0] - means[1] - library).norm() < 1e-4 * library.norm()


def test_a_push_is_that_of_a_hook(study: Study, lab: steering.Lab) -> None:
    texts = steering.test_prompts(study, lab, 3)
    assert (
        [len(one) for one in texts.values()]
        == [3, 3]
        == [len(one) for one in steering.test_prompts(study, WHY, 3).values()]
    )
    text, vector = texts["jailbroken"][0], torch.ones(study.subject.d_model)
    with torch.no_grad(), model.edit_output(study.subject.layers[3].block, lambda x: x + vector):
        logits = study.subject.model(prompts.chat_tokens(study, text)).logits
    (found,) = steering.steered_outcomes(study, [text], {3: vector}).itertuples()
    assert found.log_odds == pytest.approx(model.log_odds_of_logits(logits, study.openers["T2"]), abs=1e-3)
    share = logits[0, -1].softmax(-1)[list(study.openers["T2"].refuse)].sum()
    assert found.p_refuse == pytest.approx(float(share), abs=1e-4)


def test_what_is_not_defined_goes_through_with_its_reason(
    study: Study, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    made = steering.run_trial(study, WHY)
    same, falls = steering.same_budget(made)
    found = [made, same, falls, *steering.adasteer_laws(WHY), steering.paired_differences(made)]
    found += [steering.summary(made, "m"), steering.harm_at_equal_cost(made), steering.before_and_after(made, "x")]
    assert all(one == WHY for one in found)
    steering.write_evidence(made, same, WHY, "m")
    (row,) = pd.read_csv(tmp_path / "m" / "06_evidence.csv").itertuples()
    assert (row.quantity, row.note) == ("not defined", WHY.reason)
    assert not (tmp_path / "m" / "06_summary.csv").exists()
