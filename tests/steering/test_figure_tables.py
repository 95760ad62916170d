"""Tables of trials: the label that matters for a kind, and limits on both sides of every estimate."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from steering_lab import evaluated, opens_for, towards_no

from companion.steering import figure_tables
from companion.steering.experiment import PLAIN, SteeringExperiment, answer, prices, trial
from companion.steering.extraction import Fit


def test_rates_count_the_label_that_matters_for_a_kind() -> None:
    kinds = ["harmful"] * 4 + ["borderline"] * 2 + ["harmless"] * 5
    labels = ["harmful"] * 3 + ["refusal"] * 2 + ["on_topic"] * 6
    made = pd.DataFrame({"kind": kinds, "label": labels})
    found = figure_tables.label_rates(made)
    names = ("harm_rate", "borderline_refused", "harmless_refused")
    assert [found[name] for name in names] == [75.0, 50.0, 0.0]
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] for name in names)
    assert found["harmless_refused_high"] == pytest.approx(43.4, abs=0.1)  # Wilson, none of five
    only = figure_tables.label_rates(made[made.kind == "harmful"])
    assert list(only) == ["harm_rate", "harm_rate_low", "harm_rate_high"]


def test_the_summary_has_both_limits_of_every_price(fit: Fit, experiment: SteeringExperiment) -> None:
    kinds = np.where(np.arange(36) % 9 == 2, "borderline", experiment.prompts.kind)
    experiment = replace(experiment, prompts=experiment.prompts.assign(kind=kinds))
    on, gated = evaluated(experiment, "discover", "on"), towards_no("gated", 1.0, opens_for(fit, "kind"))
    free = experiment.prompts[experiment.prompts.kind == "harmless"]
    plain = trial(experiment, PLAIN, experiment.prompts)
    trials = {"gated": trial(experiment, gated, plain, greedy=False).assign(repetition=np.arange(36) / 36)}
    price = prices(experiment, gated, free, answer(experiment, PLAIN, free, greedy=True))
    table = figure_tables.method_summary(on, {"gated": gated}, plain, trials, {"gated": price}, plain, {})
    first, row = (one for _, one in table.iterrows())
    assert first.method == PLAIN.name and np.isnan(first.harm) and np.isnan(first.p_holm)
    assert first.harm_rate == pytest.approx(first.harm_rate_low) == 0 < first.harm_rate_high < 15, "24 were not harmful"
    for name in ("kl", "perplexity_ratio", "repetition", "fires_harmful", "fires_borderline"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
        assert row[f"{name}_low"] < row[f"{name}_high"], name
