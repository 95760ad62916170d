"""Mediation in the steered model: block by block from the intervention upwards, against full forward passes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from families import VOCAB, tiny_subject
from handmade import random_pairs, word_tokenizer
from torch import Tensor

from companion.generation import hooks
from companion.generation.forward import Switch
from companion.model import reference
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers
from companion.steering import indirect_effects

CELLS = ["y00", "y01", "y10", "y11"]
OPENERS = {"T2": Openers((5, 6), (7,))}


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


def effects(subject: Subject, steer: object) -> pd.DataFrame:
    pairs = random_pairs(4, 9, VOCAB)
    return indirect_effects.steered_effects(subject, pairs, OPENERS, steer)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", STEERINGS)
def test_a_replayed_intervention_is_that_of_a_full_pass(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, steering = replace(tiny_subject(family), tokenizer=word_tokenizer()), STEERINGS[name]
    slow = effects(subject, partial(hooks.applied, subject, steering))
    monkeypatch.setattr(reference, "interchange_full_forward", None)  # the fast path does without
    fast = effects(subject, Switch(subject, steering))
    assert fast[["pair_id", "site", "layer"]].equals(slow[["pair_id", "site", "layer"]])
    np.testing.assert_allclose(fast[CELLS], slow[CELLS], atol=2e-4, rtol=1e-4)
    plain = effects(subject, indirect_effects.nullcontext)
    assert (slow[CELLS] - plain[CELLS]).abs().max().min() > 0.01
    assert (slow.y01 - slow.y00).abs().groupby(slow.layer).max().min() > 0.01


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
