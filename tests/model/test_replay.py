"""The grid against one full forward pass per intervention, on all families; and what must hold for any model."""

from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from grid_tools import N_POS, SITES, diagonal, every_patch, mask, runs, worst
from handmade import random_pairs
from true_float64 import true_float64

from companion.base.errors import InputError
from companion.mediation import estimands
from companion.mediation.mechanisms import held_patches
from companion.model import activations, readout, replay
from companion.model.interventions import Patch


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


@pytest.mark.parametrize("family", FAMILIES)
def test_joint_interventions(family: str) -> None:
    """Several patches at once, also in one layer; a frozen site that holds the base's value against an earlier patch; and
    values of the caller's own, one vector for all or one for every cell."""
    subject, last, middle = tiny_subject(family, torch.float64), mask([8]), mask([3, 5])
    own = torch.randn(3, N_POS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with nullcontext() if family == "gpt2" else true_float64(subject.model):
        pair = base, _ = runs(subject)
        joint = [
            tuple(Patch("attn_out", layer, last) for layer in range(4)),
            (Patch("attn_out", 1, middle), Patch("head", 2, mask([4]), 2), Patch("neuron", 2, last, (5, 6))),
            (Patch("resid_post", 0, middle), Patch("mlp_out", 2, mask([8]), value=base.mlp_out[2])),
            (Patch("head", 1, diagonal(), 0), Patch("mlp_out", 1, diagonal()), Patch("resid_post", 3, mask([0]))),
            (Patch("resid_post", 0, middle), Patch("attn_out", 2, diagonal()), Patch("neuron", 3, diagonal(), 4)),
            Patch("mlp_out", 1, last),
            Patch("mlp_out", 1, mask([4, 8]), value=base.mlp_out[1].mean((0, 1))),
            Patch("neuron", 2, mask([4]), (1, 9), value=own),
        ]
        assert worst(subject, pair, joint, read=(-1, 6)) < 1e-10
        assert worst(subject, pair, joint[2:4], read=(4,)) < 1e-10


def test_readout_is_applied_to_every_patch() -> None:
    subject, rows = tiny_subject("qwen2"), torch.tensor([5, 9])
    pair, patches = runs(subject), [*every_patch((1,)), Patch("mlp_out", 0, mask([]))]
    whole = readout.logits(subject, replay.interchange(subject, *pair, patches), rows)
    kept = replay.interchange(subject, *pair, patches, readout=lambda resid: readout.logits(subject, resid, rows))
    torch.testing.assert_close(kept, whole)


@pytest.mark.parametrize("n_pairs", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2", "mistral"])
def test_both_ways_are_two_interchanges(family: str, n_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, plain = tiny_subject(family, torch.float64), replay.interchange
    with true_float64(subject.model):
        batch = estimands.run_clean(subject, random_pairs(n_pairs, 9, 60))
        orders = (batch.control, batch.treated), (batch.treated, batch.control)
        where = torch.zeros_like(batch.control.tokens, dtype=torch.bool)
        where[0, 2:5], where[-1, 4:] = True, True  # other positions in other pairs
        patches = [Patch("resid_post", 0, where), Patch("attn_out", 1, where), Patch("neuron", 2, where, (0, 3))]
        # and values of the base's own, or of both
        lists = [[*patches, *held_patches(subject, *pair, [0, 2])] for pair in orders]
        expected = [plain(subject, *pair, some)[:, :, 0] for pair, some in zip(orders, lists, strict=True)]
        called = []
        monkeypatch.setattr(replay, "interchange", lambda *a: called.append(len(a[1].tokens)) or plain(*a))
        found, apart = (replay.both_ways(subject, *orders[0], *lists, at_once=at_once) for at_once in (64, 1))
    assert called == [2 * n_pairs, n_pairs, n_pairs]
    for one, other, wanted in zip(found, apart, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-11)
        assert torch.equal(other, wanted)
    assert not torch.allclose(found[0], found[1])


def test_the_grid_ends_in_the_clean_runs() -> None:
    """Last residual, last position: the source's outcome. Last layer, elsewhere: the base. Everywhere: the source."""
    subject = tiny_subject("qwen2")
    base, source = runs(subject)
    ends = [Patch("resid_post", 3, mask([8])), Patch("resid_post", 3, mask([7]))]
    at = replay.interchange(subject, base, source, ends)
    assert torch.equal(at[:, 0, 0], source.resid_post[3][:, -1])
    assert torch.equal(at[:, 1, 0], base.resid_post[3][:, -1])
    everywhere = [Patch("resid_post", layer, torch.ones(3, N_POS, dtype=torch.bool)) for layer in range(4)]
    whole = replay.interchange(subject, base, source, everywhere)
    torch.testing.assert_close(whole[:, :, 0], source.resid_post[3][:, None, -1].expand(-1, 4, -1), rtol=0, atol=2e-5)


def test_a_sweep_calls_a_layer_once_and_none_for_what_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first different token, and for a value that is the base's own, the base's residual comes back bit for bit."""
    subject, plain, called = tiny_subject("qwen2"), replay.replay_layer, []
    base, source = runs(subject)
    monkeypatch.setattr(replay, "replay_layer", lambda *args: called.append(args[2]) or plain(*args))
    replay.interchange(subject, base, source, [Patch("mlp_out", layer, mask([8])) for layer in range(4)])
    assert called == [1, 2, 3]
    patches = [Patch(site, 0, mask([0, 1]), index) for site, index in SITES]
    patches.append(Patch("mlp_out", 1, mask([5]), value=base.mlp_out[1]))
    got = replay.interchange(subject, base, source, patches)
    assert torch.equal(got, base.resid_post[3][:, None, -1:].expand_as(got)) and called == [1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_effects_of_all_writes_add_up_to_the_whole(family: str) -> None:
    """Embedding, attention and MLP writes are all there is in the last residual stream; heads add up to attention."""
    subject = tiny_subject(family, torch.float64)
    with true_float64(subject.model):
        base, source = runs(subject)
        writes = [Patch(site, layer, mask([8])) for layer in range(4) for site in ("attn_out", "mlp_out")]
        change = replay.direct(subject, base, source, writes)[:, :, 0] - base.resid_post[3][:, None, -1]
        embedding = source.resid_pre[0][:, -1] - base.resid_pre[0][:, -1]
        whole = source.resid_post[3][:, -1] - base.resid_post[3][:, -1]
        torch.testing.assert_close(change.sum(1) + embedding, whole, rtol=0, atol=1e-10)
        heads = replay.direct(subject, base, source, [Patch("head", 2, mask([8]), (0, 1, 2, 3))])
        torch.testing.assert_close(heads[:, 0, 0] - base.resid_post[3][:, -1], change[:, 4], rtol=0, atol=1e-10)
        # A last layer's MLP has only a direct effect.
        patches = [Patch("mlp_out", 3, mask([8])), Patch("neuron", 3, mask([8]), 3), Patch("mlp_out", 3, mask([4]))]
        total, direct = (effect(subject, base, source, patches) for effect in (replay.interchange, replay.direct))
        torch.testing.assert_close(total, direct)
        assert torch.equal(direct[:, 2], base.resid_post[3][:, -1:])


def test_a_pair_does_not_feel_its_neighbours_and_a_rerun_gives_the_same_bytes() -> None:
    subject = tiny_subject("qwen2", torch.float64)
    base, source = runs(subject)
    whole = replay.interchange(subject, base, source, every_patch((1,)))
    alone = [activations.clean_run(subject, run.tokens[1:2]) for run in (base, source)]
    cut = [Patch(p.site, p.layer, p.positions[1:2], p.index) for p in every_patch((1,))]
    torch.testing.assert_close(replay.interchange(subject, *alone, cut)[0], whole[1], rtol=0, atol=1e-6)
    assert torch.equal(replay.interchange(subject, *runs(subject), every_patch((1,))), whole)


FINE, LEAN = Patch("mlp_out", 0, mask([1])), ("resid", "attn_out", "cache")
WRONG: list[tuple[str, dict]] = [
    ("unknown site 'resid_mid'; expected one of resid_post", {"patch": Patch("resid_mid", 0, mask([1]))}),
    ("layer 4 of mlp_out does not exist; layers are 0 to 3", {"patch": Patch("mlp_out", 4, mask([1]))}),
    (r"mask of shape \(3, 9\)", {"patch": Patch("mlp_out", 0, mask([1])[:, :5])}),
    ("takes no index", {"patch": Patch("mlp_out", 0, mask([1]), 2)}),
    ("expected one or several different ones of 0 to 3", {"patch": Patch("head", 0, mask([1]))}),
    ("0 to 3", {"patch": Patch("head", 0, mask([1]), 4)}), ("0 to 47", {"patch": Patch("neuron", 0, mask([1]), (3, 3))}),
    ("no patches", {"patch": ()}), ("pairs of equal length", {"width": 8}), ("do not exist", {"read": (9,)}),
    ("add 'mlp_out' to clean_run's keep", {"keep": LEAN}), ("keep names residual", {"keep": ("residual",)}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "wrong"), WRONG)
def test_wrong_patches_runs_and_read_positions_are_named(message: str, wrong: dict) -> None:
    subject = tiny_subject("llama")
    base, source = runs(subject)
    with pytest.raises(InputError, match=message):
        if "keep" in wrong:
            base = activations.clean_run(subject, base.tokens, keep=wrong["keep"])
        if "width" in wrong:
            source = activations.clean_run(subject, tokens(3, wrong["width"]))
        replay.interchange(subject, base, source, [wrong.get("patch", FINE)], read=wrong.get("read", (-1,)))
    with pytest.raises(InputError, match=r"integers of shape \(pair, pos\), not torch.int64 \(9,\)"):
        activations.clean_run(subject, base.tokens[0])
