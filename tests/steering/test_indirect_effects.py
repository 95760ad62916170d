"""Mediation in the steered model: block by block from the intervention upwards, against full passes and against a program."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from models import VOCAB, Program, compiled, cue_pairs, random_pairs, tiny_subject, word_tokenizer
from oracles import CELLS
from steering_lab import following_last

from companion.base.thresholds import COMPONENTS
from companion.generation import hooks
from companion.mediation import estimands, outcomes, study
from companion.model import replay
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers, TokenPair
from companion.steering import indirect_effects
from companion.steering.experiment import FULL, PLAIN

OPENERS = {"T2": Openers((5, 6), (7,))}
WORDS = word_tokenizer()
YES_NO = {"T2": Openers(*((WORDS.convert_tokens_to_ids(word),) for word in ("yes", "no")))}
# Read at the last token, so an intervention up to layer 2 moves the gate; and unsteered, where layer 2 is steered.
GATE = (lambda prompt: torch.sigmoid(prompt.read["g"][:, :8].sum(-1)), (hooks.Read("g", 2),))
TWO = (hooks.Edit(2, "resid_post", following_last), hooks.Edit(3, "mlp_out", following_last))
ramp = lambda x, _: torch.linspace(-2, 2, x.shape[-1]).expand(len(x), 1, -1)  # noqa: E731
STEERINGS = {
    name: hooks.Steering(name, edits, 2.0, *gate)
    for name, edits, gate in (
        ("all tokens", TWO, ()),
        ("last token", (hooks.Edit(2, "mlp_out", lambda x, _: x.tanh(), "last"),), GATE),
        ("blind", (hooks.Edit(2, "resid_post", ramp, blind=True),), GATE),
        ("gated, all tokens", TWO, GATE),
    )
}


def in_full(subject: Subject, pairs: list[TokenPair], steering: hooks.Steering) -> pd.DataFrame:
    """The effects by one full forward pass an intervention, under the steering's hooks."""
    wanted, n = estimands.mediators(subject, COMPONENTS), subject.n_layers
    with hooks.applied(subject, steering):
        batch = estimands.run_clean(subject, pairs)
        runs = (batch.control, batch.treated)  # behind what hooks saw of a plain pass, which the gates make first
        runs = [replace(run, **{name: getattr(run, name)[-n:] for name in indirect_effects.HOOKED}) for run in runs]
        made = estimands.patches(subject, replace(batch, control=runs[0], treated=runs[1]), wanted)
        both = (runs, runs[::-1])
        patched = [replay.interchange_full_forward(subject, base, source, made)[:, :, 0] for base, source in both]
    finals = torch.cat([*(run.resid_post[-1][:, -1:] for run in runs), *patched], 1)
    score = outcomes.log_odds(subject, finals, OPENERS["T2"]).numpy()
    y00, y11, y01, y10 = np.split(score, [1, 2, 2 + len(wanted)], axis=1)
    cells = {"y00": np.broadcast_to(y00, y01.shape), "y11": np.broadcast_to(y11, y01.shape), "y01": y01, "y10": y10}
    return estimands.with_estimands(estimands.tidy(pairs, wanted, "Y1", cells))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", STEERINGS)
def test_a_replayed_intervention_is_that_of_a_full_pass(family: str, name: str) -> None:
    subject, pairs = replace(tiny_subject(family), tokenizer=WORDS), random_pairs(4, 9, VOCAB)
    slow = in_full(subject, pairs, STEERINGS[name])
    fast = indirect_effects.steered_effects(subject, pairs, OPENERS, STEERINGS[name])
    assert fast[["pair_id", "site", "layer"]].equals(slow[["pair_id", "site", "layer"]])
    np.testing.assert_allclose(fast[CELLS], slow[CELLS], atol=2e-4, rtol=1e-4)
    plain = indirect_effects.steered_effects(subject, pairs, OPENERS)
    assert (slow[CELLS] - plain[CELLS]).abs().max().min() > 0.01
    assert (slow.y01 - slow.y00).abs().groupby(slow.layer).max().min() > 0.01


def test_phi_and_self_repair_of_a_known_steering() -> None:
    """Steering that takes away the layer 2 MLP's write leaves the skip path: phi is the MLP's share."""
    program = Program(gain=3.0, skip=1.0)
    model, pairs = compiled(program, tokenizer=WORDS), cue_pairs(WORDS, "off high", "on high")
    off = hooks.Steering("off", (hooks.Edit(2, "mlp_out", lambda x, _: -x),))
    before, after = (indirect_effects.steered_effects(model, pairs, YES_NO, one) for one in (PLAIN, off))
    sweep = estimands.measure_effects(model, pairs, YES_NO, estimands.mediators(model, COMPONENTS))
    assert before[["pair_id", "site", "layer"]].equals(sweep[["pair_id", "site", "layer"]])
    assert np.allclose(before[CELLS], sweep[CELLS], atol=1e-3), "the plain model's effects are those of the sweep"
    total = program.log_odds(1, 1) - program.log_odds(0, 1)
    assert indirect_effects.share_neutralised(before, after).estimate == pytest.approx((total - 1) / total, abs=0.01)
    kept, gone = (indirect_effects.share_left(before, after, layers).estimate for layers in ([0, 1], [2]))
    assert kept == pytest.approx(1 / total, abs=0.01), "what attention brings acts through the skip path only"
    assert gone == pytest.approx(0, abs=1e-6)


def lab_of(one: study.Study) -> SimpleNamespace:
    """What the effects on test pairs need of an experiment."""
    return SimpleNamespace(study=one, subject=one.subject, effort=FULL)


def test_effects_on_test_are_those_of_fewer_pairs_and_layers_where_each_is_costly() -> None:
    this = study.begin("embedded", "embedded", "own", pairs=60)
    costly = replace(this, is_costly=True)
    whole, few = (indirect_effects.test_effects(lab_of(one)) for one in (this, costly))
    assert set(few.layer) == {2, 5} and 2 <= few.pair_id.nunique() < whole.pair_id.nunique()
    both = few.merge(whole, on=["pair_id", "site", "layer"], suffixes=("", "_all"))
    assert len(both) == len(few)
    np.testing.assert_allclose(both[["nie0", "nie1"]], both[["nie0_all", "nie1_all"]], atol=1e-4)


def test_phi_from_first_tokens_is_that_of_the_steered_models_effects() -> None:
    this = study.begin("embedded", "embedded", "own", pairs=30)
    push = hooks.Steering("push", (hooks.Edit(4, "resid_post", lambda x, _: -0.3 * x),))
    lab = lab_of(this)
    before, after = (indirect_effects.test_effects(lab, one) for one in (PLAIN, push))
    (phi,) = indirect_effects.shares_neutralised(lab, {"push": (this.subject, push)}).values()
    known = indirect_effects.share_neutralised(before, after)
    assert phi.n == known.n and phi.estimate == pytest.approx(known.estimate, abs=1e-4) != 0
    assert (phi.low, phi.high) == pytest.approx((known.low, known.high), abs=1e-3)
