"""Mediation in the steered model: block by block from the intervention upwards, against full passes and against a program."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import VOCAB, tiny_subject
from handmade import Program, compiled, cue_pairs, random_pairs, word_tokenizer
from torch import Tensor

from companion.base.thresholds import COMPONENTS
from companion.generation import hooks
from companion.mediation import estimands, outcomes
from companion.model import replay
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers, TokenPair
from companion.steering import indirect_effects
from companion.steering.experiment import PLAIN

CELLS = ["y00", "y01", "y10", "y11"]
OPENERS = {"T2": Openers((5, 6), (7,))}
WORDS = word_tokenizer()
YES_NO = {"T2": Openers(*((WORDS.convert_tokens_to_ids(word),) for word in ("yes", "no")))}


def following_last(x: Tensor, prompt: hooks.Prompt) -> Tensor:
    """What is added everywhere hangs on the last token."""
    return 0.5 * x[torch.arange(len(x)), prompt.last].tanh()[:, None]


def as_far_as_read(prompt: hooks.Prompt) -> Tensor:
    return torch.sigmoid(2 * prompt.read["g"].sum(-1))


READ = hooks.Read("g", 1, plain=True)  # at the last token, so an intervention at layer 0 or 1 moves the gate
ramp = lambda x, _: torch.linspace(-2, 2, x.shape[-1]).expand(len(x), 1, -1)  # noqa: E731
STEERINGS = {
    name: hooks.Steering(name, edits, 2.0, *gate)
    for name, edits, gate in (
        ("all tokens", (hooks.Edit(2, "resid_post", following_last), hooks.Edit(3, "mlp_out", following_last)), ()),
        ("last token", (hooks.Edit(2, "mlp_out", lambda x, _: x.tanh(), "last"),), (as_far_as_read, (READ,))),
        ("blind", (hooks.Edit(2, "resid_post", ramp, blind=True),), (as_far_as_read, (READ,))),
        ("gated, all tokens", (hooks.Edit(2, "resid_post", following_last),), (as_far_as_read, (READ,))),
        ("neurons", (hooks.Edit(3, "neurons", lambda x, _: 1 - x, "last"),), (as_far_as_read, (READ,))),
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


def test_the_plain_models_effects_are_those_of_the_sweep() -> None:
    model, pairs = compiled(Program(skip=1.0), tokenizer=WORDS), cue_pairs(WORDS, "off high", "on high")
    slow = indirect_effects.steered_effects(model, pairs, YES_NO, PLAIN)
    fast = estimands.measure_effects(model, pairs, YES_NO, estimands.mediators(model, COMPONENTS))
    assert slow[["pair_id", "site", "layer"]].equals(fast[["pair_id", "site", "layer"]])
    assert np.allclose(slow[CELLS], fast[CELLS], atol=1e-3)


def test_phi_and_self_repair_of_a_known_steering() -> None:
    """Steering that takes away the layer 2 MLP's write leaves the skip path: phi is the MLP's share."""
    program = Program(gain=3.0, skip=1.0)
    model, pairs = compiled(program, tokenizer=WORDS), cue_pairs(WORDS, "off high", "on high")
    off = hooks.Steering("off", (hooks.Edit(2, "mlp_out", lambda x, _: -x),))
    before, after = (indirect_effects.steered_effects(model, pairs, YES_NO, one) for one in (PLAIN, off))
    total = program.log_odds(1, 1) - program.log_odds(0, 1)
    assert indirect_effects.share_neutralised(before, after).estimate == pytest.approx((total - 1) / total, abs=0.01)
    kept = indirect_effects.share_left(before, after, [0, 1])
    assert kept.estimate == pytest.approx(1 / total, abs=0.01), "what attention brings acts through the skip path only"
    assert indirect_effects.share_left(before, after, [2]).estimate == pytest.approx(0, abs=1e-6)


def test_layers_that_mediate_least_are_chosen_by_both_parts_and_never_the_arms_own() -> None:
    sites = [
        (0, "attn_out", 2.0),
        (0, "mlp_out", -2.0),
        (1, "attn_out", 1e-4),
        (2, "mlp_out", 0.0),
        (3, "mlp_out", -9.0),
    ]
    table = pd.DataFrame(sites, columns=["layer", "site", "nie0"]).assign(nie1=lambda rows: rows.nie0)
    assert indirect_effects.layer_effects(table).to_dict() == pytest.approx({0: 4.0, 1: 1e-4, 2: 0.0, 3: 9.0})
    assert indirect_effects.idle_layers(table, 1) == [1], "rounding counts as none; of equals the lower one is taken"
    assert indirect_effects.idle_layers(table, 2, besides=[1]) == [0, 2]
    assert indirect_effects.idle_layers(table, 9, besides=[3]) == [0, 1, 2]
