"""Single last-layer neurons and any others: exact on several families, and the tables made of them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from models import FAMILIES, VOCAB, Program, compiled, tiny_subject
from oracles import (
    YES_NO,
    clean_batch,
    cue_study,
    log_odds,
    made_effects,
    neuron_patches,
    patched,
    read_neurons,
    refusals_against_rest,
    tiny_study,
    true_float64,
)
from scipy import stats as st
from statsmodels.stats.multitest import multipletests

from companion.base.errors import InputError
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model import readout, replay
from companion.model.architecture import written_vectors
from companion.neurons import closed_form, sets, single
from companion.prompts.tokens import Openers

# ---- single ----

COLUMNS = [(layer, neuron) for layer in (0, 2, 3) for neuron in (0, 7, 30, 47)]
CHOSEN = pd.DataFrame(COLUMNS, columns=["layer", "neuron"])


def hooked(study: Study, base: torch.Tensor, source: torch.Tensor, layer: int, neuron: int) -> float:
    """Y1 of one full forward pass of the plain model, one entry of one down projection's input replaced."""
    value = read_neurons(study.subject, source, layer)[1][:, -1, neuron]

    def swap(inputs: torch.Tensor) -> None:
        inputs[:, -1, neuron] = value

    return float(log_odds(read_neurons(study.subject, base, layer, swap)[0][:, -1])[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "gemma2"])
def test_every_effect_is_that_of_a_full_forward_pass(family: str) -> None:
    study = tiny_study(family, n=6)
    with true_float64(study.subject.model), torch.no_grad():
        effects, states = single.measure_chosen(study, "T2", CHOSEN)
        assert abs(effects.nie).max() > 0.01
        group = estimands.batches(study.of("T2"), study.subject)[0]
        assert effects.pairs.pair_id.tolist() == [pair.pair.id for pair in group]
        for i in (0, 5):
            x0, x1 = estimands.prompt_tokens(study.subject, [group[i]])
            y00, y11 = (float(log_odds(study.subject.model(x).logits[:, -1])[0]) for x in (x0, x1))
            assert effects.pairs.te[i] == pytest.approx(y11 - y00, abs=1e-9) and states.resid.shape == (2, 6, 32)
            for c, (layer, neuron) in enumerate(COLUMNS):
                nie0, nie1 = hooked(study, x0, x1, layer, neuron) - y00, y11 - hooked(study, x1, x0, layer, neuron)
                found = [effects.values[name][i, c] for name in ("nie0", "nie1")]
                assert found == pytest.approx([nie0, nie1], abs=1e-9)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_direct_effects_are_the_own_write_with_the_scale_frozen(family: str) -> None:
    study = tiny_study(family, n=6)
    subject = study.subject
    with true_float64(subject.model):
        effects, _ = single.measure_chosen(study, "T2", CHOSEN)
        batch, total = clean_batch(study), np.zeros((6, len(CHOSEN)))
        patches = neuron_patches(batch, COLUMNS)
        for base, source, sign in ((batch.control, batch.treated, 1), (batch.treated, batch.control, -1)):
            like = base.resid_post[-1][:, None, -1]
            after = outcomes.log_odds(subject, replay.direct(subject, base, source, patches)[:, :, 0], YES_NO, like)
            total += sign * (after - outcomes.log_odds(subject, like, YES_NO)).numpy() / 2
        np.testing.assert_allclose(effects.values["direct"], total, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_neurons_and_sets_against_everything_else_are_those_of_the_lists(family: str) -> None:
    study, made = tiny_study(family, n=6), []
    with true_float64(study.subject.model):
        for openers in refusals_against_rest(VOCAB):
            this = replace(study, openers=dict.fromkeys(study.openers, openers))
            effects, states = single.measure_chosen(this, "T2", CHOSEN)
            order = np.arange(study.subject.d_mlp)
            few = sets.joint(study.subject, states, np.array([[1, 5, 30]]))
            some = sets.cumulative(study.subject, states, order, [1, 20, 48])
            tables = [*effects.values.values(), *few.values.values(), *some.values.values(), effects.pairs[["te"]]]
            made.append(np.concatenate([np.asarray(one) for one in tables], axis=1))
        np.testing.assert_allclose(made[0], made[1], rtol=0, atol=1e-11)
        assert abs(made[0]).max() > 0.01


def test_batches_are_joined_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(n=6)
    whole, whole_states = single.measure_chosen(study, "T2", CHOSEN)
    monkeypatch.setattr(estimands, "batches", lambda pairs, _: [pairs[:3], pairs[3:]])
    effects, states = single.measure_chosen(study, "T2", CHOSEN)
    pd.testing.assert_frame_equal(effects.pairs, whole.pairs)
    np.testing.assert_allclose(effects.nie, whole.nie, atol=1e-6)
    torch.testing.assert_close(states.neurons, whole_states.neurons, rtol=0, atol=1e-6)


def test_neurons_that_no_difference_reaches_are_exact_zeros() -> None:
    """The compiled model hands cue A to the last token in layer 1 and reads it in neuron 3 of layer 2, nowhere else."""
    study = cue_study(compiled(Program()))
    effects, _ = single.measure_chosen(study, "T2", single.all_neurons(study.subject))
    at = effects.columns.query("layer == 2 and neuron == 3").index[0]
    np.testing.assert_allclose(effects.nie[:, at], effects.pairs.te, rtol=1e-3)
    np.testing.assert_allclose(effects.values["direct"][:, at], effects.pairs.te, rtol=1e-3)
    assert abs(np.delete(effects.nie, at, axis=1)).max() < 1e-3
    assert not effects.nie[:, effects.columns.layer == 0].any()


def test_the_contrast_subtracts_each_pairs_own_twin() -> None:
    study = tiny_study(n=6)
    harmful, twin = (single.measure_chosen(study, name, CHOSEN)[0] for name in ("T2", "T2b"))
    made = single.difference(harmful, twin, {"T2 4": "T2b 1", "T2 0": "T2b 5", "T2 3": "gone"})
    assert made.treatment == "T2-T2b" and made.pairs.pair_id.tolist() == ["T2 0", "T2 4"]
    np.testing.assert_array_equal(made.nie, harmful.nie[[0, 4]] - twin.nie[[5, 1]])
    np.testing.assert_array_equal(made.pairs.te, harmful.pairs.te.to_numpy()[[0, 4]] - twin.pairs.te.to_numpy()[[5, 1]])


def noisy(n: int = 120, n_neurons: int = 300, seed: int = 0) -> np.ndarray:
    """Noise of 0.3 everywhere but in neurons 0 (large), 1 (tiny but sure), 2 (large, negative) and 3 (zero by structure)."""
    values = 0.3 * np.random.default_rng(seed).standard_normal((n, n_neurons))
    values[:, :4] = [2.0, 0.05, -2.0, 0.0] + values[:, :4] * [1, 0.01, 1, 0]
    return values


def test_only_large_and_sure_neurons_pass() -> None:
    found = [single.neuron_table(made_effects(noisy(seed=seed))).query("split == 'test'") for seed in range(40)]
    passed = [set(np.flatnonzero(single.passing(rows))) for rows in found]
    assert all({0, 2} <= one and not {1, 3} & one for one in passed)
    assert np.mean([len(one - {0, 2}) / len(one) for one in passed]) <= 0.05  # the false discovery rate
    # The second is sure, but 0.05 is below 1 % of a total effect of 10.
    assert found[0].q_value.iloc[1] < 1e-6 and single.passing(found[0].assign(te=1.0))[:3].all()
    assert found[0].q_value.iloc[3] == 1 and not single.passing(found[0].assign(exact=False)).any()


def test_intervals_and_tests_are_over_topics() -> None:
    values = noisy(60)
    effects = made_effects(values, per_topic=2)
    rows = single.neuron_table(effects).query("split == 'all'")
    by_topic = values.reshape(30, 2, -1).mean(1)
    p = st.ttest_1samp(np.delete(by_topic, 3, axis=1), 0).pvalue
    np.testing.assert_allclose(np.delete(rows.q_value, 3), multipletests(p, method="fdr_by")[1], rtol=1e-9)
    low, high = st.ttest_1samp(by_topic[:, 0], 0).confidence_interval()
    assert (rows.ci_low.iloc[0], rows.ci_high.iloc[0]) == pytest.approx((low, high))
    assert (rows.nie0.iloc[0], rows.te.iloc[0]) == pytest.approx((values[:, 0].mean(), 10.0))
    few = single.neuron_table(made_effects(noisy(6), per_topic=2))
    one = few[(few.split == "test") & (few.neuron != 3)]  # a split of one topic has no interval
    assert list(few) == list(single.NEURONS) and set(few.split) == set(single.SPLITS)
    assert np.isinf(one.ci_low).all() and (one.q_value == 1).all()


def test_signs_and_ranking_are_those_of_discover() -> None:
    effects = made_effects(noisy())
    te = np.where(effects.pairs.split == "discover", -10.0, 5.0)
    turned = single.neuron_table(replace(effects, pairs=effects.pairs.assign(te=te)))
    turned = turned[turned.neuron == 0].set_index("split")
    assert turned.te["discover"] == 10 and turned.te["test"] == -5
    assert (turned[["nie0", "nie1", "direct"]] < -1.5).all(axis=None)
    shifted = effects.values["nie0"].copy()
    shifted[(effects.pairs.split != "discover").to_numpy(), 9] = 50.0  # must not be looked at
    rows = single.neuron_table(made_effects(shifted))
    assert single.ranking(rows, "T2", 0)[:2].tolist() in ([0, 2], [2, 0])


def test_what_cannot_be_measured_is_named() -> None:
    effects = made_effects(np.ones((12, 3)))
    with pytest.raises(InputError, match="no pairs of T1: it has T2, T2b"):
        single.measure_chosen(tiny_study(), "T1", CHOSEN)
    with pytest.raises(InputError, match="no pair is in the discover split"):
        single.signed(single.in_split(effects, "test"))
    with pytest.raises(InputError, match="no rows of T9, layer 0"):
        single.ranking(single.neuron_table(effects), "T9", 0)


# ---- closed form ----


@pytest.mark.parametrize("family", FAMILIES)
def test_every_last_layer_neuron_to_rounding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows, openers by lists, and refusals against the whole vocabulary, read block by block."""
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    monkeypatch.setattr(closed_form, "BLOCK_LOGITS", 11 * VOCAB)
    study, few, (rest, lists) = tiny_study(family, n=3), Openers((5, 9), (33,)), refusals_against_rest(VOCAB)
    with true_float64(study.subject.model):
        batch = clean_batch(study)
        runs = study.subject, batch.control, batch.treated
        whole = readout.logits(study.subject, patched(study, batch, [(3, neuron) for neuron in range(48)]))
        effect = float((whole - readout.logits(study.subject, batch.control.resid_post[3][:, None, -1])).abs().max())
        assert effect > 0.1
        rows = closed_form.last_layer_neurons(*runs, torch.tensor([5, 9, 33]))
        torch.testing.assert_close(rows, whole[..., [5, 9, 33]], rtol=0, atol=1e-10 * effect)
        found = closed_form.last_layer_log_odds(*runs, few)
        torch.testing.assert_close(found, log_odds(whole, few), rtol=0, atol=1e-10 * effect)
        if closed_form.is_closed(study.subject):
            found = closed_form.last_layer_both_ways(*runs, rest.refuse)[0]
        else:
            found = closed_form.last_layer_log_odds(*runs, rest)
        torch.testing.assert_close(found, log_odds(whole, lists), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", [one for one in FAMILIES if closed_form.is_closed(tiny_subject(one))])
def test_outputs_that_are_kept_and_logits_far_from_the_clean_runs(family: str) -> None:
    """A change a thousand times as large drives exponentials below the clean run's largest out of range."""
    study, refuse = tiny_study(family, n=3), refusals_against_rest(VOCAB)[0].refuse
    subject, last = study.subject, study.subject.layers[-1]
    with true_float64(subject.model):
        batch = clean_batch(study)
        runs = batch.control, batch.treated
        kept = closed_form.last_layer_both_ways(subject, *runs, refuse, closed_form.last_layer_outputs(subject))
        for one, other in zip(kept, closed_form.last_layer_both_ways(subject, *runs, refuse), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        resid, vectors = runs[0].resid_post[3][:, -1], written_vectors(last.down_proj)
        for size in (1.0, 1e5):
            change = size * (runs[1].neurons[3] - runs[0].neurons[3])[:, -1]
            frozen = torch.ones(len(change), dtype=torch.bool)
            found = closed_form.written_log_odds(subject, resid, change, vectors, refuse, frozen)
            moved = resid[:, None] + change[..., None] * vectors
            known = readout.log_odds_against_rest(subject, moved, refuse, norm_like=resid[:, None])
            torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-10)
    assert known.abs().max() > 1000


@pytest.mark.parametrize(("down", "is_sure"), [(60, True), (100, False), (200, False)])
def test_exponentials_that_lose_digits_are_not_trusted(down: float, is_sure: bool) -> None:
    """In float32 they do so some ninety nats below the largest, while their sum is still above 0."""
    ones, outputs = torch.ones(1, 1, 1), torch.full((1, VOCAB), -down)
    found = closed_form._against_rest(tiny_subject("llama"), outputs, torch.zeros(1, VOCAB), ones, ones, [], [3])
    assert bool(found.isfinite()) is is_sure
    assert not is_sure or found.item() == pytest.approx(np.log(VOCAB - 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_known_in_half_precision_too(family: str) -> None:
    half, whole = (tiny_subject(family, dtype).final_norm for dtype in (torch.bfloat16, torch.float32))
    assert torch.allclose(readout.norm_gain(half)[0].float(), readout.norm_gain(whole)[0], atol=0.01)
