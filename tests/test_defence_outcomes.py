"""Effects of a known steering, on a compiled model."""

from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch
from handmade import Program, compiled, cue_pairs, word_tokenizer

from companion.mediation import estimands
from companion.model.activations import on_output
from companion.prompts.tokens import Openers
from companion.steering import indirect_effects


def test_the_plain_models_effects_are_those_of_the_sweep() -> None:
    tokenizer = word_tokenizer()
    model = compiled(Program(skip=1.0), tokenizer=tokenizer)
    pairs = cue_pairs(tokenizer, "off high", "on high")
    openers = {"T2": Openers(*((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))}
    slow = indirect_effects.steered_effects(model, pairs, openers)
    fast = estimands.measure_effects(model, pairs, openers, estimands.mediators(model, ["attn_out", "mlp_out"]))
    assert slow[["pair_id", "site", "layer"]].equals(fast[["pair_id", "site", "layer"]])
    assert np.allclose(slow[["y00", "y01", "y10", "y11"]], fast[["y00", "y01", "y10", "y11"]], atol=1e-3)


def test_phi_and_self_repair_of_a_known_steering() -> None:
    """Steering that takes away the layer 2 MLP's write leaves the skip path: phi is the MLP's share."""
    tokenizer = word_tokenizer()
    program = Program(gain=3.0, skip=1.0)
    model = compiled(program, tokenizer=tokenizer)
    pairs = cue_pairs(tokenizer, "off high", "on high")
    openers = {"T2": Openers(*((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))}

    def off() -> AbstractContextManager[None]:
        return on_output(model.layers[2].mlp_write, torch.zeros_like)

    before = indirect_effects.steered_effects(model, pairs, openers)
    after = indirect_effects.steered_effects(model, pairs, openers, off)
    total = program.log_odds(1, 1) - program.log_odds(0, 1)
    assert indirect_effects.share_neutralised(before, after).estimate == pytest.approx((total - 1) / total, abs=0.01)
    kept = indirect_effects.share_left(before, after, [0, 1])
    assert kept.estimate == pytest.approx(
        1 / total, abs=0.01
    )  # what attention brings now acts through the skip path only
    assert indirect_effects.share_left(before, after, [2]).estimate == pytest.approx(0, abs=1e-6)
