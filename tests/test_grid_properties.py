"""What must hold for any model: limits of the grid, direct effects, logits."""

import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from test_grid import N_POS, SITES, every_patch, mask, runs
from torch import Tensor
from true_float64 import true_float64

from companion.base.errors import InputError
from companion.model import activations, propagation, readout, replay
from companion.model.interventions import Patch


def everywhere() -> Tensor:
    return torch.ones(3, N_POS, dtype=torch.bool)


def test_the_grid_ends_in_the_clean_runs() -> None:
    """Last residual, last position: the source's outcome. Last layer, elsewhere: the base. Everywhere: the source."""
    subject = tiny_subject("qwen2")
    base, source = runs(subject)
    at = replay.interchange(
        subject, base, source, [Patch("resid_post", 3, mask([8])), Patch("resid_post", 3, mask([7]))]
    )
    assert torch.equal(at[:, 0, 0], source.resid_post[3][:, -1])
    assert torch.equal(at[:, 1, 0], base.resid_post[3][:, -1])
    whole = replay.interchange(subject, base, source, [Patch("resid_post", layer, everywhere()) for layer in range(4)])
    torch.testing.assert_close(whole[:, :, 0], source.resid_post[3][:, None, -1].expand(-1, 4, -1), rtol=0, atol=2e-5)


def test_joint_attention_at_the_last_token_carries_everything_if_only_earlier_tokens_differ() -> None:
    subject = tiny_subject("llama", torch.float64)
    control, treated = tokens(seed=1), tokens(seed=2)
    treated[:, -1] = control[:, -1]
    base, source = activations.clean_run(subject, control), activations.clean_run(subject, treated)
    joint = [tuple(Patch("attn_out", layer, mask([8])) for layer in range(4))]
    got = replay.interchange(subject, base, source, joint)[:, 0, 0]
    torch.testing.assert_close(got, source.resid_post[3][:, -1], rtol=0, atol=1e-6)


def test_a_patch_that_changes_nothing_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first different token, and for a value that is the base's own, the base's residual comes back bit for bit."""
    subject = tiny_subject("qwen2")
    base, source = runs(subject)
    monkeypatch.setattr(propagation, "replay", lambda *_: pytest.fail("nothing had to be computed"))
    patches = [Patch(site, 0, mask([0, 1]), index) for site, index in SITES]
    patches.append(Patch("mlp_out", 1, mask([5]), value=base.mlp_out[1]))
    got = replay.interchange(subject, base, source, patches)
    assert torch.equal(got, base.resid_post[3][:, None, -1:].expand_as(got))


def test_one_sweep_calls_every_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    base, source = runs(subject)
    called: list[int] = []
    plain = propagation.replay

    def counted(subject, base, layer, *rest):
        called.append(layer)
        return plain(subject, base, layer, *rest)

    monkeypatch.setattr(propagation, "replay", counted)
    replay.interchange(subject, base, source, [Patch("mlp_out", layer, mask([8])) for layer in range(4)])
    assert called == [1, 2, 3]


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


def test_a_last_layer_mlp_has_only_a_direct_effect() -> None:
    subject = tiny_subject("gemma2")
    pair = runs(subject)
    patches = [Patch("mlp_out", 3, mask([8])), Patch("neuron", 3, mask([8]), 3), Patch("mlp_out", 3, mask([4]))]
    total, direct = replay.interchange(subject, *pair, patches), replay.direct(subject, *pair, patches)
    torch.testing.assert_close(total, direct)
    assert torch.equal(direct[:, 2], pair[0].resid_post[3][:, -1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_librarys(family: str) -> None:
    subject = tiny_subject(family)
    base, source = runs(subject)
    plain = subject.model(base.tokens).logits
    rows = torch.tensor([3, 60, 4])
    torch.testing.assert_close(readout.logits(subject, base.resid_post[3]), plain)
    torch.testing.assert_close(readout.logits(subject, base.resid_post[3], rows), plain[..., rows])
    frozen = readout.logits(subject, base.resid_post[3], rows, norm_like=base.resid_post[3])
    torch.testing.assert_close(frozen, plain[..., rows], rtol=1e-4, atol=1e-5)
    other = readout.logits(subject, source.resid_post[3], rows, norm_like=base.resid_post[3])
    assert not torch.allclose(other, readout.logits(subject, source.resid_post[3], rows), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_need_no_vocabulary_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, also where exp would overflow, and with a frozen norm."""
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    subject = tiny_subject(family, torch.float64)
    base, source = runs(subject)
    rows, like = torch.tensor([3, 60, 4]), source.resid_post[3]
    for factor in (1, 1000):
        with torch.no_grad():
            subject.unembed.weight.mul_(factor)
        for norm_like in (None, like):
            wanted = readout.logits(subject, base.resid_post[3], norm_like=norm_like).log_softmax(-1)[..., rows]
            got = readout.log_probs(subject, base.resid_post[3], rows, norm_like=norm_like)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_frozen_logits_are_affine_in_the_residual() -> None:
    subject = tiny_subject("gpt2", torch.float64)
    base, source = runs(subject)
    like, other = base.resid_post[3], source.resid_post[3]
    middle = readout.logits(subject, (like + other) / 2, norm_like=like)
    ends = readout.logits(subject, like, norm_like=like) + readout.logits(subject, other, norm_like=like)
    torch.testing.assert_close(middle, ends / 2, rtol=0, atol=1e-12)


def test_a_pair_does_not_feel_its_neighbours() -> None:
    subject = tiny_subject("qwen2", torch.float64)
    base, source = runs(subject)
    whole = replay.interchange(subject, base, source, every_patch((1,)))
    alone = [activations.clean_run(subject, run.tokens[1:2]) for run in (base, source)]
    cut = [Patch(p.site, p.layer, p.positions[1:2], p.index) for p in every_patch((1,))]
    torch.testing.assert_close(replay.interchange(subject, *alone, cut)[0], whole[1], rtol=0, atol=1e-6)


def test_a_rerun_gives_the_same_bytes() -> None:
    subject = tiny_subject("phi3")
    first, again = (replay.interchange(subject, *runs(subject), every_patch((0, 2))) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (Patch("resid_mid", 0, mask([1])), "unknown site 'resid_mid'; expected one of resid_post"),
        (Patch("mlp_out", 4, mask([1])), "layer 4 of mlp_out does not exist; layers are 0 to 3"),
        (Patch("mlp_out", 0, mask([1])[:, :5]), r"mask of shape \(3, 9\)"),
        (Patch("mlp_out", 0, mask([1]), 2), "takes no index"),
        (Patch("head", 0, mask([1])), "expected one or several different ones of 0 to 3"),
        (Patch("head", 0, mask([1]), 4), "0 to 3"),
        (Patch("neuron", 0, mask([1]), (3, 3)), "0 to 47"),
        ((), "no patches"),
    ],
)
def test_wrong_patches_are_named(patch: Patch, message: str) -> None:
    subject = tiny_subject("llama")
    pair = runs(subject)
    with pytest.raises(InputError, match=message):
        replay.interchange(subject, *pair, [patch])


def test_wrong_runs_and_read_positions_are_named() -> None:
    subject = tiny_subject("llama")
    base, source = runs(subject)
    patches = [Patch("mlp_out", 0, mask([1]))]
    with pytest.raises(InputError, match="pairs of equal length"):
        replay.interchange(subject, base, activations.clean_run(subject, tokens(3, 8)), patches)
    with pytest.raises(InputError, match="do not exist"):
        replay.interchange(subject, base, source, patches, read=(9,))
    padded = activations.clean_run(subject, base.tokens, torch.arange(9) < torch.tensor([[9], [8], [7]]))
    with pytest.raises(InputError, match="is padding in some pair"):
        replay.interchange(subject, padded, source, patches)
    lean = activations.clean_run(subject, base.tokens, keep=("resid", "attn_out", "cache"))
    with pytest.raises(InputError, match="add 'mlp_out' to clean_run's keep"):
        replay.interchange(subject, lean, source, patches)
    with pytest.raises(InputError, match="keep names residual"):
        activations.clean_run(subject, base.tokens, keep=("residual",))
