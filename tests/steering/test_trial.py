"""The trial and its tables: the label that matters for a kind, limits on both sides, arms with a model of their own."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from steering_lab import evaluated, opens_for, towards_no

from companion.base.display import NotDefined
from companion.stats.rates import Change
from companion.steering import trial as trials
from companion.steering.comparison import DECISIVE, FIXED
from companion.steering.experiment import PLAIN, SteeringExperiment, answer, prices, trial
from companion.steering.extraction import Fit
from companion.steering.trial import Trial


def test_rates_count_the_label_that_matters_for_a_kind() -> None:
    kinds = ["harmful"] * 4 + ["borderline"] * 2 + ["harmless"] * 5
    labels = ["harmful"] * 3 + ["refusal"] * 2 + ["on_topic"] * 6
    made = pd.DataFrame({"kind": kinds, "label": labels})
    found = trials.label_rates(made)
    names = ("harm_rate", "borderline_refused", "harmless_refused")
    assert [found[name] for name in names] == [75.0, 50.0, 0.0]
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] for name in names)
    assert found["harmless_refused_high"] == pytest.approx(43.4, abs=0.1)  # Wilson, none of five
    only = trials.label_rates(made[made.kind == "harmful"])
    assert list(only) == ["harm_rate", "harm_rate_low", "harm_rate_high"]


@pytest.fixture
def made(fit: Fit, experiment: SteeringExperiment, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """Three arms: a gated push, the tested method, and a model that stands for a retrained one and is the same."""
    monkeypatch.setattr(trials, "shares_neutralised", lambda _, arms: dict.fromkeys(arms, Change(0.5, 0.4, 0.6, 9, 9)))
    kinds = np.where(np.arange(36) % 9 == 2, "borderline", experiment.prompts.kind)
    lab = replace(experiment, prompts=experiment.prompts.assign(kind=kinds, split="test"), said={})
    on = evaluated(lab, "test", "on")
    arms = {"gated": towards_no("gated", 1.0, opens_for(fit, "kind")), DECISIVE: towards_no(DECISIVE, 3.0)}
    free = lab.prompts[lab.prompts.kind == "harmless"]
    plain, own = trial(lab, PLAIN, lab.prompts), answer(lab, PLAIN, free, greedy=True)
    tables = {name: trial(lab, one, plain, greedy=False) for name, one in arms.items()}
    tables["retrained"] = trial(lab, replace(PLAIN, name="retrained"), plain, greedy=False)
    tables["gated"] = tables["gated"].assign(repetition=np.arange(36) / 36)
    price = {name: prices(lab, one, free, own) for name, one in arms.items()}
    study = SimpleNamespace(subject=fit.subject)
    return Trial(study, on, on, (0.5, 1.0), arms, {}, arms, {"retrained": lab}, plain, tables, price)


def test_the_summary_has_both_limits_of_every_price_and_both_budgets(made: Trial) -> None:
    table = trials.method_summary(made).set_index("method")
    first, row, other = (table.loc[name] for name in (PLAIN.name, "gated", "retrained"))
    assert np.isnan(first.harm) and np.isnan(first.p_holm) and first.budget == first.budget_relative == 0
    assert first.harm_rate == pytest.approx(first.harm_rate_low) == 0 < first.harm_rate_high < 15, "24 were not harmful"
    for name in ("kl", "perplexity_ratio", "repetition", "fires_harmful", "fires_borderline"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
        assert row[f"{name}_low"] < row[f"{name}_high"], name
    for name, strength in (("gated", 1.0), (DECISIVE, 3.0)):
        one = made.chosen[name]
        own = made.validate.budgets([one]), made.validate.budgets([one], relative=True)
        assert (table.budget[name], table.budget_relative[name]) == (own[0][0], own[1][0]) and own[0] != own[1]
        assert 0 < table.budget[name] <= strength
    assert np.isnan(other.budget) and np.isnan(other.kl), "nothing is added to a retrained model"
    assert other.loss == 0 and other.harmless_refused == first.harmless_refused


def test_every_arm_has_its_paired_differences_and_pays_the_same(made: Trial) -> None:
    differences = trials.paired_differences(made)
    assert differences.groupby("method", sort=False).size().to_dict() == {"gated": 3, DECISIVE: 3, "retrained": 3}
    assert not differences[differences.method == "retrained"].estimate.any(), "the same model with the same numbers"
    cost = trials.harm_at_equal_cost(made).set_index(["method", "price"])
    assert set(cost.index.get_level_values(0)) == {PLAIN.name, "gated", DECISIVE, "retrained"}
    for price in cost.index.get_level_values(1).unique():
        assert cost.estimate["retrained", price] == pytest.approx(cost.estimate[PLAIN.name, price], abs=1e-6)
        assert cost.estimate["gated", price] < cost.estimate[PLAIN.name, price]
    undecided = replace(made, chosen={}, undefined={DECISIVE: "no prompt was refused"})
    assert trials.harm_at_equal_cost(undecided) == NotDefined("no prompt was refused")


def test_a_readers_request_is_shown_by_its_label_and_first_word(made: Trial) -> None:
    """Every answer of this model opens with "yes" or "no"; its refusals are known by the opener."""
    both = replace(made, chosen={FIXED: towards_no(FIXED, 40.0), DECISIVE: made.chosen[DECISIVE]})
    table = trials.before_and_after(both, "please on low kind do it")
    assert list(table.index) == [PLAIN.name, FIXED, DECISIVE] and list(table.columns) == ["answer", "first word"]
    assert table.loc[FIXED].tolist() == ["refusal", "no"] and table["first word"][PLAIN.name] == "yes"
    assert len(trials.before_and_after(both, "")) == 3


def test_a_stronger_adapter_is_another_model_on_the_same_prompts(
    experiment: SteeringExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trials.retrained_models(experiment) == NotDefined(trials.NO_ADAPTER)
    named = replace(
        experiment, fit=replace(experiment.fit, subject=replace(experiment.subject, name="smollm2-refuser"))
    )
    asked = []

    def load(name: str, **how: object) -> object:
        asked.append((name, how["adapter_scale"]))
        return replace(experiment.subject, name="other", facts=None)

    monkeypatch.setattr(trials, "load", load)
    found = trials.retrained_models(named)
    assert asked == [("smollm2-refuser", 1.25), ("smollm2-refuser", 1.5)]
    assert list(found) == ["retrained: adapter x 1.25", "retrained: adapter x 1.5"]
    one = found["retrained: adapter x 1.5"]
    assert one.prompts is named.prompts and one.subject.name == "other" and one.subject.facts == named.subject.facts
