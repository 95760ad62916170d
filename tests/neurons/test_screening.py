"""The gradient screen against exact effects, and its own measure of how far it can be trusted."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from effect_tools import refusals_against_rest
from families import FAMILIES, VOCAB
from neuron_tools import clean_batch, made_effects, patched, tiny_study
from scipy.stats import spearmanr
from true_float64 import true_float64

from companion.neurons.screening import ScreenTrust, attribution, estimates, is_small, screen_trust, to_recheck
from companion.neurons.sets import measure_all
from companion.neurons.single import all_neurons, in_split


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_small_differences_are_estimated_to_first_order(family: str) -> None:
    """If the source differs from the base by a thousandth, gradient times difference is the exact effect nearly."""
    study = tiny_study(family, n=3)
    subject = study.subject
    subject.model.requires_grad_(False)

    def difference(resid: torch.Tensor) -> torch.Tensor:
        logits = subject.unembed(subject.final_norm(resid))
        return logits[..., 5] - logits[..., 9]

    with true_float64(subject.model):
        batch = clean_batch(study)
        base, source = batch.control, batch.treated
        near = tuple(b + 1e-3 * (s - b) for b, s in zip(base.neurons, source.neurons, strict=True))
        batch = replace(batch, treated=replace(source, neurons=near))
        estimate = attribution(subject, base, batch.treated, difference)
        columns = [(layer, neuron) for layer in (0, 2, 3) for neuron in range(0, 48, 5)]
        exact = difference(patched(study, batch, columns)) - difference(base.resid_post[3][:, None, -1])
        wanted = torch.stack([estimate[:, layer, neuron] for layer, neuron in columns], dim=1)
        assert float((exact - wanted).abs().max()) < 2e-2 * float(exact.abs().max())
        assert float(exact.abs().max()) > 1e-6


def test_estimates_follow_exact_effects() -> None:
    """Signs, directions and twins included: on a random model the straight line is nearly right."""
    study = tiny_study(n=24)
    measured = measure_all(study, dict.fromkeys(("T2", "T2b"), all_neurons(study.subject)))
    for name in ("T2", "T2-T2b"):
        guess, exact = estimates(study, name), in_split(measured.effects[name], "discover").nie.mean(0)
        assert spearmanr(guess.estimate, exact).statistic > 0.9
        assert np.polyfit(exact, guess.estimate, 1)[0] == pytest.approx(1, abs=0.3)


def test_the_gradient_against_everything_else_is_that_of_the_lists() -> None:
    for family in ("gemma2", "gpt2"):
        study, found = tiny_study(family, n=6, treatments=("T2",)), []
        with true_float64(study.subject.model):
            for openers in refusals_against_rest(VOCAB):
                found.append(estimates(replace(study, openers={"T2": openers}), "T2").estimate)
        np.testing.assert_allclose(*found, rtol=0, atol=1e-12)
        assert found[0].abs().max() > 1e-3


def screened(estimate: np.ndarray, exact: np.ndarray, top: int = 50, random: int = 100) -> ScreenTrust:
    found = pd.DataFrame({"layer": 0, "neuron": np.arange(len(exact)), "estimate": estimate})
    chosen = to_recheck(found, top, random)
    return screen_trust(chosen, made_effects(np.tile(exact[chosen.neuron], (12, 1))), len(exact), top=20)


def test_how_far_a_screen_can_be_trusted() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_t(3, size=2000)
    good = screened(exact + 0.01 * rng.normal(size=2000), exact)
    assert good.recall == 1.0 and good.correlation > 0.95
    bad = screened(rng.normal(size=2000), exact)
    assert abs(bad.correlation) < 0.4 and bad.recall < 0.8
    half = screened(np.where(np.arange(2000) < 1000, exact, 0.0), exact, random=1000)  # saturated: no gradient
    assert half.recall < 0.8
    nothing = screened(exact, np.zeros(2000))
    assert np.isnan(nothing.correlation)


def test_a_large_model_is_screened_and_what_is_rechecked() -> None:
    subject = tiny_study().subject
    assert is_small(subject) and not is_small(replace(subject, n_layers=24, d_mlp=4864))
    found = all_neurons(subject).assign(estimate=np.arange(192.0) - 96)
    chosen = to_recheck(found, 10, 15)
    assert chosen.estimate[chosen.is_top].abs().min() >= chosen.estimate[~chosen.is_top].abs().max()
    assert (chosen.is_top.sum(), (~chosen.is_top).sum()) == (10, 15)
    assert not chosen.duplicated(["layer", "neuron"]).any() and to_recheck(found, 500, 500).is_top.all()
