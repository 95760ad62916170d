"""The grid against one full forward pass per intervention: all families, sites and kinds of positions."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from torch import Tensor
from true_float64 import true_float64

from companion.model import activations, readout, reference, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch

N_POS = 9
SITES = [("resid_post", None), ("attn_out", None), ("mlp_out", None), ("head", 1), ("head", (0, 3)), ("neuron", 7),
         ("neuron", (3, 40))]  # fmt: skip
COLUMNS = {"first": [0], "middle": [4], "last": [8], "group": [3, 5], "from 2 on": [2, 3, 4, 5, 6, 7, 8]}


def mask(columns: list[int], n_pairs: int = 3, n_pos: int = N_POS) -> Tensor:
    made = torch.zeros(n_pairs, n_pos, dtype=torch.bool)
    made[:, columns] = True
    return made


def diagonal() -> Tensor:
    """Another position in every pair."""
    made = torch.zeros(3, N_POS, dtype=torch.bool)
    made[[0, 1, 2], [3, 5, 8]] = True
    return made


def every_patch(layers: tuple[int, ...] = (0, 1, 3)) -> list[Patch]:
    masks = [mask(columns) for columns in COLUMNS.values()] + [diagonal()]
    return [Patch(site, layer, where, index) for layer in layers for where in masks for site, index in SITES]


def runs(subject: Subject, attention_mask: Tensor | None = None) -> tuple[CleanRun, CleanRun]:
    control, treated = tokens(seed=1), tokens(seed=2)
    treated[:, :2] = control[:, :2]
    return activations.clean_run(subject, control, attention_mask), activations.clean_run(
        subject, treated, attention_mask
    )


def worst(subject: Subject, pair: tuple[CleanRun, CleanRun], patches: list, read: object = (-1,)) -> float:
    """The largest deviation from the reference, as a share of the largest effect."""
    fast = replay.interchange(subject, *pair, patches, read=read)
    plain = reference.interchange_full_forward(subject, *pair, patches, read=read)
    effect = plain - replay.interchange(subject, *pair, [Patch("mlp_out", 0, mask([]))], read=read)
    assert float(effect.abs().max()) > 0.1
    return float((fast - plain).abs().max() / effect.abs().max())


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_exact_on_every_family(family: str, attention: str | None) -> None:
    subject = tiny_subject(family, torch.float64, attention)
    with true_float64(subject.model):
        assert worst(subject, runs(subject), every_patch(), read=(-1, 4)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_library_is_exact_up_to_rounding(family: str, dtype: torch.dtype) -> None:
    subject = tiny_subject(family, dtype)
    assert worst(subject, runs(subject), every_patch((1, 2))) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch(family: str, side: str, attention: str) -> None:
    if family == "gemma2" and attention == "sdpa":
        pytest.skip("the library computes Gemma 2 eagerly only")
    subject = tiny_subject(family, torch.float64, attention)
    lengths = torch.tensor([9, 7, 5])
    position = torch.arange(N_POS)
    real = position >= 9 - lengths[:, None] if side == "left" else position < lengths[:, None]
    last = torch.full((3, 1), 8) if side == "left" else lengths[:, None] - 1
    patches = [Patch(s, layer, mask([4, 5]) & real, i) for s, i in SITES for layer in (0, 2)]
    patches += [Patch(s, 1, torch.zeros_like(real).scatter(1, last, True), i) for s, i in SITES]
    with true_float64(subject.model):
        pair = runs(subject, real.long())
        assert worst(subject, pair, patches, read=last) < 1e-10
        padded = replay.interchange(subject, *pair, patches, read=last)
        for i, n in enumerate(lengths.tolist()):  # the same as alone and unpadded
            one = real[i]
            alone = [activations.clean_run(subject, run.tokens[i : i + 1, one]) for run in pair]
            cut = [Patch(p.site, p.layer, p.positions[i : i + 1, one], p.index) for p in patches]
            torch.testing.assert_close(replay.interchange(subject, *alone, cut)[0], padded[i], rtol=0, atol=1e-10)
            assert alone[0].tokens.shape == (1, n)


@pytest.mark.parametrize("family", FAMILIES)
def test_joint_interventions(family: str) -> None:
    """Several patches at once, also in one layer, and a frozen site that holds the base's value against an earlier patch."""
    subject = tiny_subject(family, torch.float64)
    last, middle = mask([8]), mask([3, 5])
    with nullcontext() if family == "gpt2" else true_float64(subject.model):
        pair = base, _ = runs(subject)
        joint = [
            tuple(Patch("attn_out", layer, last) for layer in range(4)),
            (Patch("attn_out", 1, middle), Patch("head", 2, mask([4]), 2), Patch("neuron", 2, last, (5, 6))),
            (Patch("resid_post", 0, middle), Patch("mlp_out", 2, mask([8]), value=base.mlp_out[2])),
            (Patch("head", 1, diagonal(), 0), Patch("mlp_out", 1, diagonal()), Patch("resid_post", 3, mask([0]))),
            (Patch("resid_post", 0, middle), Patch("attn_out", 2, diagonal()), Patch("neuron", 3, diagonal(), 4)),
            Patch("mlp_out", 1, last),
        ]
        assert worst(subject, pair, joint, read=(-1, 6)) < 1e-10
        assert worst(subject, pair, joint[2:4], read=(4,)) < 1e-10


def test_values_of_the_callers_own() -> None:
    """A mean ablation (one vector for all) and a value for every cell."""
    subject = tiny_subject("llama", torch.float64)
    pair = base, _ = runs(subject)
    mean = base.mlp_out[1].mean((0, 1))
    own = torch.randn(3, N_POS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    patches = [Patch("mlp_out", 1, mask([4, 8]), value=mean), Patch("neuron", 2, mask([4]), (1, 9), value=own)]
    assert worst(subject, pair, patches) < 1e-5


def test_readout_is_applied_to_every_patch() -> None:
    subject = tiny_subject("qwen2")
    pair = runs(subject)
    patches = [*every_patch((1,)), Patch("mlp_out", 0, mask([]))]
    rows = torch.tensor([5, 9])
    whole = readout.logits(subject, replay.interchange(subject, *pair, patches), rows)
    kept = replay.interchange(subject, *pair, patches, readout=lambda resid: readout.logits(subject, resid, rows))
    torch.testing.assert_close(kept, whole)
