"""Identities that hold in every network, and cells computed by plain forward passes."""

import numpy as np
import pytest
import torch
from effect_tools import DIRECT, FAMILIES, YES_NO, cell, log_odds, one, runs
from families import tiny_subject
from handmade import random_pairs
from torch import Tensor

from companion.mediation import estimands, outcomes
from companion.mediation.estimands import Mediator, mediators
from companion.model import replay
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.prompts import positions

# ---- identities that hold in every network ----


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_identities(family: str) -> None:
    subject = tiny_subject(family)
    pairs = random_pairs(5, 10, 61)
    wanted = mediators(subject, ["resid_post"], ["last", "all", "rest"])
    table = one(subject, pairs, *wanted)
    size = table.te.abs().max()
    assert size > 0.1
    last = cell(table, "resid_post", 3)
    np.testing.assert_allclose(last[["nie0", "nie1"]], last[["te", "te"]], atol=1e-6 * size)
    for layer in range(4):
        whole = cell(table, "resid_post", layer, "all")
        np.testing.assert_allclose(whole[["nie0", "nie1"]], whole[["te", "te"]], atol=1e-4 * size)
    other = cell(table, "resid_post", 3, "rest")
    assert (other[["nie0", "nie1"]] == 0).all(axis=None)
    assert (cell(table, "resid_post", 2, "rest")[["nie0", "nie1"]].abs() > 1e-3 * size).any(axis=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_outputs_at_the_last_token_carry_te_jointly(family: str) -> None:
    subject = tiny_subject(family)
    pairs = random_pairs(5, 10, 61)  # the last two tokens are the same in both prompts
    batch = estimands.run_clean(subject, pairs)
    last = torch.tensor(positions.stack(pairs, "", "last"))
    attention, mlps = ([Patch(site, layer, last) for layer in range(4)] for site in ("attn_out", "mlp_out"))
    for base, source in ((batch.control, batch.treated), (batch.treated, batch.control)):
        found = replay.interchange(subject, base, source, [attention, mlps, attention[:3]])[:, :, 0]
        scores = outcomes.log_odds(subject, found, YES_NO)
        wanted = outcomes.log_odds(subject, source.resid_post[-1][:, -1], YES_NO)
        assert torch.allclose(scores[:, 0], wanted, atol=1e-4)
        assert (scores[:, 1] - wanted).abs().max() > 1e-2
        assert (scores[:, 2] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "gpt2"])  # Gemma 2 caps its logits, which is not linear
def test_direct_effects_add_up_to_the_frozen_norm_effect(family: str) -> None:
    subject = tiny_subject(family)
    table = one(subject, random_pairs(5, 10, 61), *mediators(subject, DIRECT), names=("contrast.frozen", "Y1.frozen"))
    for outcome, is_additive in (("contrast.frozen", True), ("Y1.frozen", False)):
        sums = table[table.outcome == outcome].groupby("pair_id")[["nie0", "nie1", "te"]].sum()
        gap = (sums[["nie0", "nie1"]].sub(sums.te / 8, axis=0)).abs().max(axis=None)
        assert (gap < 1e-5 * sums.te.abs().max()) == is_additive


def test_heads_write_what_their_attention_writes() -> None:
    subject = tiny_subject("llama")
    wanted = mediators(subject, ["attn_out.direct", "head.direct"])
    table = one(subject, random_pairs(5, 10, 61), *wanted, names=("contrast.frozen",))
    sums = table.groupby(["site", "pair_id", "layer"]).nie0.sum().unstack("site")
    np.testing.assert_allclose(sums["head.direct"], sums["attn_out.direct"], atol=1e-5)
    assert table.nie0.abs().max() > 0.1


# ---- plain forward passes ----


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_cells_of_a_plain_forward_pass(family: str) -> None:
    """Hooks on the library's own modules, one pass a cell, the library's own logits."""
    subject = tiny_subject(family)
    pairs = random_pairs(4, 9, 61)
    ids = [torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated")]
    for layer, site, group in [
        (1, "resid_post", "rest"),
        (2, "attn_out", "last"),
        (0, "mlp_out", "differ"),
        (3, "mlp_out", "last"),
    ]:
        block = subject.model.model.layers[layer]
        module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[site]
        where = torch.tensor(positions.stack(pairs, "", group))[..., None]
        table = one(subject, pairs, Mediator(site, layer, group))
        for cell_name, base, source in (("y01", 0, 1), ("y10", 1, 0)):
            patched = log_odds(_patched(subject, module, ids[base], ids[source], where))
            np.testing.assert_allclose(table[cell_name], patched, atol=1e-4)
        for cell_name, clean in zip(("y00", "y11"), runs(subject, pairs), strict=True):
            np.testing.assert_allclose(table[cell_name], log_odds(clean), atol=1e-4)
        assert (table.nie0.abs() > 1e-3).any()


def _patched(subject: Subject, module: torch.nn.Module, base: Tensor, source: Tensor, where: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def swap(_: torch.nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        own = output[0] if isinstance(output, tuple) else output
        seen.append(own)
        if len(seen) == 1:
            return None
        mixed = torch.where(where, seen[0], own)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = module.register_forward_hook(swap)
    try:
        subject.model(source)
        return subject.model(base).logits[:, -1]
    finally:
        handle.remove()


def test_frozen_outcomes_by_hand() -> None:
    subject = tiny_subject("llama")
    pairs = random_pairs(4, 9, 61)
    batch = estimands.run_clean(subject, pairs)
    y01, y10 = estimands.final_residuals(subject, batch, [Mediator("mlp_out", 2)], "")
    control, treated = (run.resid_post[-1][:, -1] for run in (batch.control, batch.treated))
    norm, unembed = subject.model.model.norm, subject.model.lm_head.weight
    scale = torch.rsqrt(control.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    table = one(subject, pairs, Mediator("mlp_out", 2), names=("Y1.frozen", "contrast.frozen"))
    own = [logits.detach().softmax(-1) for logits in runs(subject, pairs)]
    weights = [
        [p[:, list(camp)] / p[:, list(camp)].sum(-1, keepdim=True) for p in own]
        for camp in (YES_NO.comply, YES_NO.refuse)
    ]
    comply, refuse = ((at_control + at_treated) / 2 for at_control, at_treated in weights)
    for name, resid in {"y00": control, "y01": y01[:, 0], "y10": y10[:, 0], "y11": treated}.items():
        logits = (resid * scale * norm.weight) @ unembed.T
        np.testing.assert_allclose(table.loc[table.outcome == "Y1.frozen", name], log_odds(logits), atol=1e-4)
        logits = logits.detach()
        linear = (logits[:, list(YES_NO.comply)] * comply).sum(-1) - (logits[:, list(YES_NO.refuse)] * refuse).sum(-1)
        np.testing.assert_allclose(table.loc[table.outcome == "contrast.frozen", name], linear, atol=1e-4)
