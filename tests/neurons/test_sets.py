"""Sets of neurons: joint effects against the replay, the gradient screen against exact effects, and neighbourhood."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from models import FAMILIES, VOCAB
from oracles import (
    YES_NO,
    additive,
    clean_batch,
    made_effects,
    patched,
    refusals_against_rest,
    tiny_study,
    true_float64,
)
from scipy.stats import spearmanr

from companion.base.errors import InputError
from companion.mediation import estimands, outcomes
from companion.mediation.estimands import Mediator
from companion.mediation.study import Study
from companion.neurons import adjacency, sets
from companion.neurons.screening import attribution, estimates, is_small, screen_trust, to_recheck
from companion.neurons.sets import measure_all
from companion.neurons.single import FinalStates, PairEffects, all_neurons, in_split

# ---- sets ----

SETS = np.array([[0, 5, 9], [47, 3, 20], [11, 30, 2]])


def last_states(study: Study) -> FinalStates:
    return measure_all(study, {"T2": all_neurons(study.subject, [3])}).states["T2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_are_what_the_replay_computes(family: str) -> None:
    study = tiny_study(family, n=6)
    subject = study.subject
    with true_float64(subject.model):
        made, batch = sets.joint(subject, last_states(study), SETS), clean_batch(study)
        swapped = replace(batch, control=batch.treated, treated=batch.control)
        for name, one, sign in (("nie0", batch, 1), ("nie1", swapped, -1)):
            after = outcomes.log_odds(subject, patched(study, one, [(3, tuple(m)) for m in SETS.tolist()]), YES_NO)
            start = outcomes.log_odds(subject, one.control.resid_post[-1][:, -1:], YES_NO)
            assert float((after - start).abs().max()) > 0.01
            np.testing.assert_allclose(made.values[name], (sign * (after - start)).numpy(), atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_what_is_read_off_is_what_formed_vectors_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(family, n=6)
    subject, order, ks = study.subject, np.random.default_rng(0).permutation(48), sets.sizes(48)
    with true_float64(subject.model):
        states = last_states(study)
        idle = replace(states, neurons=states.neurons[:1].expand(2, -1, -1))  # nothing differs
        made = []
        for few, small, block in ((32, 1024, sets.BLOCK), (0, 0, 1)):
            for name, value in (("FEW", few), ("SMALL", small), ("BLOCK", block)):
                monkeypatch.setattr(sets, name, value)
            made.append([sets.joint(subject, states, SETS), sets.cumulative(subject, states, order, ks)])
            assert not sets.joint(subject, idle, SETS).nie.any()
        prefixes = np.column_stack([sets.joint(subject, states, order[None, :k]).nie for k in ks])
    np.testing.assert_allclose(made[0][1].nie, prefixes, atol=1e-9)
    for fast, slow in zip(*made, strict=True):
        assert abs(slow.nie).max() > 0.01
        for name in ("nie0", "nie1"):
            np.testing.assert_allclose(fast.values[name], slow.values[name], atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_all_neurons_are_the_mlp_output(family: str) -> None:
    study = tiny_study(family, n=6)
    with true_float64(study.subject.model):
        states = last_states(study)
        asked = (study.of("T2"), study.openers, [Mediator("mlp_out", 3)], ["Y1", "Y1.frozen"])
        plain = estimands.measure_effects(study.subject, *asked)
        for outcome, is_frozen in (("Y1", False), ("Y1.frozen", True)):
            wanted = plain[plain.outcome == outcome].set_index("pair_id").loc[states.pairs.pair_id]
            made = sets.whole_layer(study.subject, states, is_frozen)
            for name in ("nie0", "nie1"):
                np.testing.assert_allclose(made.values[name][:, 0], wanted[name], atol=1e-9)
            np.testing.assert_allclose(made.pairs.te, wanted.te, atol=1e-9)
        every = sets.joint(study.subject, states, np.arange(48)[None])
        np.testing.assert_allclose(every.nie, sets.whole_layer(study.subject, states).nie, atol=1e-9)


def test_a_contrast_of_sets_subtracts_twins_and_is_signed_on_discover() -> None:
    study = tiny_study(n=12)
    measured = measure_all(study, dict.fromkeys(("T2", "T2b"), all_neurons(study.subject, [3])))
    sign = np.sign(measured.effects["T2-T2b"].pairs.query("split == 'discover'").te.mean())
    made = sets.on_contrast(measured, "T2-T2b", "test", lambda states: sets.joint(study.subject, states, SETS))
    whole = {name: sets.joint(study.subject, states, SETS) for name, states in measured.states.items()}
    by_id = {name: dict(zip(one.pairs.pair_id, one.nie, strict=True)) for name, one in whole.items()}
    assert set(made.pairs.split) == {"test"} and len(made.pairs) == 4
    for pair_id, effect in zip(made.pairs.pair_id, made.nie, strict=True):
        np.testing.assert_allclose(effect, sign * (by_id["T2"][pair_id] - by_id["T2b"][study.twins[pair_id]]))


def test_k90_must_stay_in_the_band() -> None:
    cases = {
        (0.2, 0.5, 0.9, 0.95, 1.0, 1.0): (2, 3), (2.0, 2.0, 2.0, 2.0, 2.0, 1.0): (5, 5), (0, 0, 0, 0, 0, 1): (6, 6),
        (0.2, 0.95, 0.8, 0.95, 1.0, 1.0): (2, 4),  # leaves the band below
        (0.6, 1.0, 1.2, 1.15, 1.05, 1.0): (1, 4),  # overshoots: at 4 it is above, but stays from there on
    }  # fmt: skip
    ks, share = np.arange(1, 7), np.array(list(cases), dtype=float)
    found = [tuple(pair) for pair in np.stack([sets.settles(share, ks, level) for level in (0.5, 0.9)], axis=1)]
    assert found == list(cases.values())
    assert np.isnan(sets.settles(np.array([0.95, 0.95, 0.2]), ks[:3], 0.9))
    assert np.isnan(sets.settles(np.full(3, np.nan), ks[:3], 0.9))
    assert sets.settles(np.array([0.5, 1.0]), np.array([10, 200]), 0.9) == 200  # sets.sizes, not places


def curve_of(measured: sets.Measured, order: np.ndarray) -> PairEffects:
    """The joint effects on test of the first k neurons of an order."""
    apply = partial(sets.cumulative, measured.study.subject, order=order, ks=sets.sizes(len(order)))
    return sets.on_contrast(measured, "T2", "test", apply)


def test_a_layer_of_known_neurons() -> None:
    writes = np.zeros(40)
    writes[[3, 17, 22, 39]], writes[8] = 2.0, -1.0
    _, measured = additive(writes)
    curve = curve_of(measured, np.argsort(-abs(writes), kind="stable"))
    np.testing.assert_allclose(curve.nie[0, [0, 3, 4, 39]], [2, 8, 7, 7], rtol=1e-4)
    assert sets.SUMMARY == ("psi", "k50", "k90")  # 8 / 7 is beyond 1.1, but what follows stays within
    assert sets.curve_summary(curve).estimate == pytest.approx([1, 2, 4], rel=1e-4)
    late = curve_of(measured, np.argsort(-writes, kind="stable"))
    assert sets.curve_summary(late).estimate[2] == 39  # the last one takes the overshoot back
    # Nothing settles where the layer works against the treatment.
    _, measured = additive(np.array([1.0, -3.0]))
    measured.effects["T2"].pairs["te"] = 5.0  # the rest of the network turns it round
    curve = curve_of(measured, np.array([0, 1]))
    assert sets.curve_summary(curve).estimate == pytest.approx([-0.4, 3, 3], rel=1e-4)  # one more than there are
    assert sets.curve_shares(curve).empty


def test_set_sizes() -> None:
    large = sets.sizes(14336)
    assert (sets.sizes(1).tolist(), sets.sizes(384).tolist()) == ([1], list(range(1, 385)))
    assert large[:512].tolist() == list(range(1, 513)) and large[-1] == 14336
    assert (np.diff(large) > 0).all() and (large[1:] / large[:-1])[512:].max() < 1.03


def test_what_is_no_set() -> None:
    subject, measured = additive(np.ones(6))
    for members in ([[0, 0]], [[0, 6]], [[-1, 2]], [1, 2]):
        with pytest.raises(InputError, match="different neurons of 0 to 5"):
            sets.joint(subject, measured.states["T2"], np.array(members))


# ---- screening ----


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


def test_how_far_a_screen_can_be_trusted() -> None:
    def screened(estimate: np.ndarray, exact: np.ndarray, random: int = 100) -> tuple[float, float]:
        chosen = to_recheck(pd.DataFrame({"layer": 0, "neuron": range(2000), "estimate": estimate}), 50, random)
        return tuple(screen_trust(chosen, made_effects(np.tile(exact[chosen.neuron], (12, 1))), 2000, top=20))

    rng = np.random.default_rng(0)
    exact = rng.standard_t(3, size=2000)
    correlation, recall = screened(exact + 0.01 * rng.normal(size=2000), exact)
    assert recall == 1.0 and correlation > 0.95
    correlation, recall = screened(rng.normal(size=2000), exact)
    assert abs(correlation) < 0.4 and recall < 0.8
    assert screened(np.where(np.arange(2000) < 1000, exact, 0.0), exact, 1000)[1] < 0.8  # saturated: no gradient
    assert np.isnan(screened(exact, np.zeros(2000))[0])


def test_a_large_model_is_screened_and_what_is_rechecked() -> None:
    subject = tiny_study().subject
    assert is_small(subject) and not is_small(replace(subject, n_layers=24, d_mlp=4864))
    found = all_neurons(subject).assign(estimate=np.arange(192.0) - 96)
    chosen = to_recheck(found, 10, 15)
    assert chosen.estimate[chosen.is_top].abs().min() >= chosen.estimate[~chosen.is_top].abs().max()
    assert (chosen.is_top.sum(), (~chosen.is_top).sum()) == (10, 15)
    assert not chosen.duplicated(["layer", "neuron"]).any() and to_recheck(found, 500, 500).is_top.all()


# ---- adjacency ----


def dense(values: np.ndarray, layer: np.ndarray, half_width: int) -> float:
    """Moran's I from the matrix of weights, as the textbook writes it."""
    place = np.concatenate([np.arange((layer == one).sum()) for one in np.unique(layer)])
    apart = abs(place[:, None] - place)
    weight = (layer[:, None] == layer) & (apart > 0) & (apart <= half_width)
    z = values - np.array([values[layer == one].mean() for one in layer])
    return len(z) / weight.sum() * (z @ weight @ z) / (z @ z)


@pytest.mark.parametrize("half_width", [1, 3, 8, 500])
def test_morans_i_is_the_textbooks(half_width: int) -> None:
    rng = np.random.default_rng(half_width)
    layer = np.repeat([2, 5, 9], [30, 80, 12])
    values = rng.exponential(size=(4, 122)) + layer
    made = adjacency.morans_i(values, layer, half_width)
    np.testing.assert_allclose(made, [dense(row, layer, half_width) for row in values], rtol=1e-9)
    assert np.isnan(adjacency.morans_i(np.ones(122), layer, half_width))


def test_layers_do_not_make_neighbours() -> None:
    rng, layer = np.random.default_rng(0), np.repeat([0, 1], 300)
    values = rng.normal(size=600) ** 2 * np.where(layer == 0, 1.0, 100.0)
    assert abs(adjacency.morans_i(adjacency.ranks_in_layer(values, layer), layer)) < 0.05
    ranks = adjacency.ranks_in_layer(np.array([[-3.0, 1.0, 2.0, 2.0]]), np.zeros(4, int))
    assert ranks.tolist() == [[4.0, 1.0, 2.5, 2.5]]


def test_the_interval_covers_exchangeable_indices() -> None:
    rng, found = np.random.default_rng(0), []
    for seed in range(100):
        effects = made_effects(rng.standard_t(3, size=150) + 0.5 * rng.standard_normal((24, 150)))
        found.append(adjacency.moran_test(effects, n_permutations=199, seed=seed))
    assert sum(one.low <= 0 <= one.high for one in found) >= 88 and sum(one.p <= 0.05 for one in found) <= 11


def test_neighbours_that_are_alike_are_found() -> None:
    rng = np.random.default_rng(0)
    smooth = np.convolve(rng.normal(size=420), np.ones(21), "valid")
    means = np.concatenate([np.zeros(50), smooth, rng.permutation(smooth)])
    layer = np.repeat([0, 1, 2], [50, 400, 400])
    effects = made_effects(means + 0.1 * rng.standard_normal((24, 850)) * (layer > 0), layer)
    found = adjacency.moran_test(effects, n_permutations=999)
    assert found.layers == (1, 2)  # a layer of zeros is left out
    assert found.low > 0.05 and found.p == 0.001


def test_what_has_no_neighbours_is_refused() -> None:
    with pytest.raises(InputError, match="a window of half-width 8 needs 17"):
        adjacency.windows(np.arange(16))
    with pytest.raises(InputError, match="no neuron has any effect: there is nothing whose place could matter"):
        adjacency.moran_test(made_effects(np.zeros((12, 40))))


def test_a_window_wins_where_neighbours_belong_together_and_not_elsewhere() -> None:
    writes = np.zeros(120)
    writes[40:45] = 1.0
    for place, wins in ((np.arange(120), True), (np.random.default_rng(3).permutation(120), False)):
        _, measured = additive(writes[place])
        ranked = np.argsort(-writes[place], kind="stable")
        made = adjacency.window_contest(measured, "T2", ranked, half_width=2)
        shares = dict(zip(adjacency.CONTEST, made.shares.estimate, strict=True))
        assert (made.p == 0.05) == wins and (shares["best window"] > 0.99) == wins
        assert shares["top ranked"] == pytest.approx(1, abs=1e-3)
        # Chosen by sums of single effects, which here are the joint ones.
        quick = replace(measured, study=replace(measured.study, is_costly=True))
        again = adjacency.window_contest(quick, "T2", ranked, half_width=2)
        np.testing.assert_allclose(again.shares.estimate, made.shares.estimate, atol=1e-6)


def test_groups_are_chosen_on_discover_alone() -> None:
    """On discover one block of neurons changes, on the other splits another: the window must be that of discover."""
    writes = np.zeros(60)
    writes[[*range(10, 15), *range(40, 45)]] = 1.0
    _, measured = additive(writes)
    states = measured.states["T2"]
    is_discover = torch.tensor((states.pairs.split == "discover").to_numpy())
    states.neurons[1, is_discover, 40:45] = 0.0
    states.neurons[1, ~is_discover, 10:15] = 0.0
    made = adjacency.window_contest(measured, "T2", np.arange(60), half_width=2)
    assert made.shares.estimate[0] == pytest.approx(0, abs=1e-9)  # measured where those neurons do nothing
