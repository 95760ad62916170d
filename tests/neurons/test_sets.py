"""Joint effects of sets of last-layer neurons against the replay."""

from dataclasses import replace

import numpy as np
import pytest
from effect_tools import YES_NO
from families import FAMILIES
from neuron_tools import clean_batch, patched, tiny_study
from true_float64 import true_float64

from companion.mediation import estimands, outcomes
from companion.mediation.estimands import Mediator
from companion.mediation.study import Study
from companion.neurons.sets import cumulative, joint, measure_all, on_contrast, sizes, whole_layer
from companion.neurons.single import FinalStates, all_neurons

SETS = np.array([[0, 5, 9], [47, 3, 20], [11, 30, 2]])


def last_states(study: Study) -> FinalStates:
    return measure_all(study, {"T2": all_neurons(study.subject, [3])}).states["T2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sets_are_what_the_replay_computes(family: str) -> None:
    study = tiny_study(family, n=6)
    subject = study.subject
    with true_float64(subject.model):
        made, batch = joint(subject, last_states(study), SETS), clean_batch(study)
        swapped = replace(batch, control=batch.treated, treated=batch.control)
        for name, one, sign in (("nie0", batch, 1), ("nie1", swapped, -1)):
            after = outcomes.log_odds(subject, patched(study, one, [(3, tuple(m)) for m in SETS.tolist()]), YES_NO)
            start = outcomes.log_odds(subject, one.control.resid_post[-1][:, -1:], YES_NO)
            assert float((after - start).abs().max()) > 0.01
            np.testing.assert_allclose(made.values[name], (sign * (after - start)).numpy(), atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_what_is_read_off_is_what_formed_vectors_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(family, n=6)
    order, ks = np.random.default_rng(0).permutation(48), sizes(48)
    with true_float64(study.subject.model):
        states = last_states(study)
        idle = replace(
            states, neurons=states.neurons[:1].expand(2, -1, -1)
        )  # nothing differs, so nothing has an effect
        made = []
        for few, small in ((32, 1024), (0, 0)):
            monkeypatch.setattr("companion.neurons.sets.FEW", few)
            monkeypatch.setattr("companion.neurons.sets.SMALL", small)
            made.append([joint(study.subject, states, SETS), cumulative(study.subject, states, order, ks)])
            assert not joint(study.subject, idle, SETS).nie.any()
    for fast, slow in zip(*made, strict=True):
        assert abs(slow.nie).max() > 0.01
        for name in ("nie0", "nie1"):
            np.testing.assert_allclose(fast.values[name], slow.values[name], atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_all_neurons_are_the_mlp_output(family: str) -> None:
    study = tiny_study(family, n=6)
    with true_float64(study.subject.model):
        states = last_states(study)
        plain = estimands.measure_effects(
            study.subject, study.of("T2"), study.openers, [Mediator("mlp_out", 3)], ["Y1", "Y1.frozen"]
        )
        for outcome, is_frozen in (("Y1", False), ("Y1.frozen", True)):
            wanted = plain[plain.outcome == outcome].set_index("pair_id").loc[states.pairs.pair_id]
            made = whole_layer(study.subject, states, is_frozen)
            for name in ("nie0", "nie1"):
                np.testing.assert_allclose(made.values[name][:, 0], wanted[name], atol=1e-9)
            np.testing.assert_allclose(made.pairs.te, wanted.te, atol=1e-9)
        every = joint(study.subject, states, np.arange(48)[None])
        np.testing.assert_allclose(every.nie, whole_layer(study.subject, states).nie, atol=1e-9)


def test_a_curve_is_the_joint_effect_of_each_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    study = tiny_study(n=6)
    order, ks = np.random.default_rng(0).permutation(48), np.array([1, 2, 7, 20, 48])
    with true_float64(study.subject.model):
        states = last_states(study)
        wanted = np.column_stack([joint(study.subject, states, order[None, :k]).nie for k in ks])
        np.testing.assert_allclose(cumulative(study.subject, states, order, ks).nie, wanted, atol=1e-9)
        monkeypatch.setattr("companion.neurons.sets.SMALL", 0)
        monkeypatch.setattr("companion.neurons.sets.BLOCK", 1)  # one neuron at a time
        np.testing.assert_allclose(cumulative(study.subject, states, order, ks).nie, wanted, atol=1e-9)
        np.testing.assert_allclose(joint(study.subject, states, order[:6].reshape(3, 2)).nie.shape, (6, 3))


def test_a_contrast_of_sets_subtracts_twins_and_is_signed_on_discover() -> None:
    study = tiny_study(n=12)
    measured = measure_all(study, dict.fromkeys(("T2", "T2b"), all_neurons(study.subject, [3])))
    sign = np.sign(measured.effects["T2-T2b"].pairs.query("split == 'discover'").te.mean())
    made = on_contrast(measured, "T2-T2b", "test", lambda states: joint(study.subject, states, SETS))
    whole = {name: joint(study.subject, states, SETS) for name, states in measured.states.items()}
    by_id = {name: dict(zip(one.pairs.pair_id, one.nie, strict=True)) for name, one in whole.items()}
    assert set(made.pairs.split) == {"test"}
    assert len(made.pairs) == 4
    for pair_id, effect in zip(made.pairs.pair_id, made.nie, strict=True):
        np.testing.assert_allclose(effect, sign * (by_id["T2"][pair_id] - by_id["T2b"][study.twins[pair_id]]))


def test_set_sizes() -> None:
    assert sizes(384).tolist() == list(range(1, 385))
    large = sizes(14336)
    assert large[:512].tolist() == list(range(1, 513)) and large[-1] == 14336
    assert (np.diff(large) > 0).all() and (large[1:] / large[:-1])[512:].max() < 1.03
    assert sizes(1).tolist() == [1]
