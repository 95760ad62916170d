"""What notebooks 00 and 01 show of prompts and answers, on the shipped model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from companion.base import paths
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.files import read_json
from companion.mediation.study import Study
from helpers import model, prompts


def test_the_pair_that_flips_is_refused_in_one_wrapper_and_answered_in_the_other(study: Study) -> None:
    pair = prompts.clearest_flip(study)
    clean = prompts.clean_outcomes(replace(study, pairs=(pair,)))
    assert clean.y00[0] < 0 < clean.y11[0]
    assert prompts.shown_answer(study, pair, "control").startswith("refused: sorry")
    said = prompts.shown_answer(study, pair, "treated")
    assert said.startswith("answered, first word: ") and len(said.split()) == 4, "no more of a harmful answer is shown"
    twin = next(one for one in study.of("T2b") if one.pair.id == pair.pair.twin)
    assert len(prompts.shown_answer(study, twin, "control").split()) > 4
    hidden = replace(twin, pair=replace(twin.pair, sensitive=True))
    assert prompts.shown_answer(study, hidden, "control") == "answered"


def test_a_pair_of_a_set_without_wrappers_flips_towards_refusal(study: Study) -> None:
    pair = prompts.clearest_flip(replace(study, pairs=tuple(study.of("T1"))))
    clean = prompts.clean_outcomes(replace(study, pairs=(pair,)))
    assert clean.y11[0] < 0 < clean.y00[0]


def test_the_map_of_a_pair_holds_the_mean_of_both_directions(study: Study) -> None:
    pair = model.example_pair(study)
    table = model.component_map(study, pair)
    effects = model.effects_of_pair(study, pair, ["attn_out", "mlp_out"])
    assert isinstance(table, pd.DataFrame) and len(table) == 2 * study.subject.n_layers
    np.testing.assert_allclose(table.share, (effects.nie0 + effects.nie1) / 2 / effects.te)
    assert model.component_map(study, NotDefined("too long")) == NotDefined("too long")


def test_a_refusal_rate_is_a_mean_of_probabilities() -> None:
    y = np.log([1.0, 3.0, 1 / 3, 9.0])
    clean = pd.DataFrame({"treatment": "T2", "topic": list("abcd"), "y00": y, "y11": 5.0})
    table = prompts.refusal_rates(clean)
    assert table[["prompt", "request"]].to_numpy().tolist() == [
        ["neutral wrapper", "harmful"],
        ["jailbreak wrapper", "harmful"],
    ]
    assert table.estimate[0] == pytest.approx((0.5 + 0.25 + 0.75 + 0.1) / 4) and table.greedy[0] == 0.25


def test_the_facts_of_the_model_are_a_file(study: Study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    assert "layers" in " ".join(model.write_facts(replace(study, slug="mine")).fact)
    assert read_json(tmp_path / "mine" / "model_facts.json")["layers"] == study.subject.n_layers
    with pytest.raises(InputError, match="was not checked"):
        model.write_facts(replace(study, subject=replace(study.subject, facts=None)))
