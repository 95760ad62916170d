"""The grid against one full forward pass per intervention, on all families; runs that share a prefix; the read-out."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import FAMILIES, random_pairs, tiny_model, tiny_subject, tokens
from oracles import N_POS, PATCH_SITES, diagonal, every_patch, mask, runs, true_float64, worst
from torch import nn

from companion.base.errors import InputError
from companion.mediation import estimands
from companion.mediation.mechanisms import held_patches
from companion.model import activations, readout, replay, verify
from companion.model.interventions import Patch
from companion.model.load import from_model

# ---- replay ----

# The last two as the library is: its norms cast to float32.
EXACT = [
    (torch.float64, None, 1e-10),
    (torch.float64, "eager", 1e-10),
    (torch.float64, None, 1e-5),
    (torch.float32, None, 1e-5),
]


@pytest.mark.parametrize(("dtype", "attention", "bound"), EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_up_to_rounding(family, dtype, attention, bound) -> None:
    subject = tiny_subject(family, dtype, attention)
    with true_float64(subject.model) if bound < 1e-9 else nullcontext():
        assert worst(subject, runs(subject), every_patch(), read=(-1, 4)) < bound


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
        lists = [[*patches, *held_patches(subject, pair[0], [0, 2])] for pair in orders]
        expected = [plain(subject, *pair, some)[:, :, 0] for pair, some in zip(orders, lists, strict=True)]
        called = []
        monkeypatch.setattr(replay, "interchange", lambda *a: called.append(len(a[1].tokens)) or plain(*a))
        found, apart = (replay.both_ways(subject, *orders[0], *lists, at_once=at_once) for at_once in (64, 1))
    assert called == [2 * n_pairs, n_pairs, n_pairs]
    for one, other, wanted in zip(found, apart, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-11)
        assert torch.equal(other, wanted)
    assert not torch.allclose(found[0], found[1])


def test_a_sweep_calls_a_layer_once_and_none_for_what_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, plain, called = tiny_subject("qwen2"), replay.replay_layer, []
    base, source = runs(subject)
    monkeypatch.setattr(replay, "replay_layer", lambda *args: called.append(args[2]) or plain(*args))
    replay.interchange(subject, base, source, [Patch("mlp_out", layer, mask([8])) for layer in range(4)])
    assert called == [1, 2, 3]
    patches = [Patch(site, 0, mask([0, 1]), index) for site, index in PATCH_SITES]
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


# ---- activations ----

LAYERS = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons", "keys", "values")
N_SHARED = 5  # longer than the windows of most families, and than the first token alone


def sharing(n_shared: int, seed: int = 0) -> torch.Tensor:
    """Prompts whose first tokens are those of the first."""
    ids = tokens(seed=seed)
    ids[:, :n_shared] = ids[0, :n_shared]
    return ids


def share_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the model is, and however little it saves."""
    monkeypatch.setattr(activations, "SMALLEST", 0)
    monkeypatch.setattr(activations, "PAYS", {"cpu": 1})


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_what_a_plain_run_keeps_and_interventions_are_exact(family, attention) -> None:
    subject = tiny_subject(family, torch.float64, attention)
    with true_float64(subject.model):
        for n in (1, N_SHARED, 8):
            plain, once = (activations.clean_run(subject, sharing(n), shared=shared) for shared in (0, n))
            for name in LAYERS:
                torch.testing.assert_close(getattr(once, name), getattr(plain, name), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(once.calls, plain.calls, rtol=0, atol=0)
        groups = [Patch("resid_post", 1, mask(columns)) for columns in ([1, 3], [4, 5], list(range(9)))]
        pair = tuple(activations.clean_run(subject, sharing(N_SHARED, seed), shared=N_SHARED) for seed in (1, 2))
        assert worst(subject, pair, [*every_patch((0, 2)), *groups], read=(-1, 4)) < 1e-10


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_attention_weights_times_values_are_what_the_output_projection_reads(family: str) -> None:
    """The weights that the plain implementation hands out are those of the loaded one (which skips Gemma 2's cap on scores)."""
    subject = tiny_subject(family, torch.float64)
    run, before = activations.clean_run(subject, tokens(), shared=0), subject.model.config._attn_implementation
    with torch.no_grad(), activations.eager_attention(subject):
        weights = subject.model(tokens(), output_attentions=True).attentions
    assert subject.model.config._attn_implementation == before != "eager"
    for z, values, own in zip(run.z, run.values, weights, strict=True):
        of_heads = own @ values.repeat_interleave(subject.n_heads // values.shape[1], dim=1)
        torch.testing.assert_close(of_heads.transpose(1, 2).flatten(2), z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_of_pairs_are_what_each_is_alone_with_equal_bits_where_tokens_are_equal(family, monkeypatch) -> None:
    share_always(monkeypatch)
    subject, pairs = from_model(tiny_model(family)), random_pairs(4, 16, 60)
    for pair in pairs:
        for side, n in ((pair.control, 10), (pair.treated, 12)):  # the treated prompts share more, among themselves
            side[:n] = pairs[0].control[:n]
    sides, batch = estimands.prompt_tokens(subject, pairs), estimands.run_clean(subject, pairs)
    assert [activations.shared_prefix(subject, *some) for some in (sides, sides[1:])] == [10, 12]
    for layer in range(subject.n_layers):
        control, treated = (run.resid_post[layer][:, :10] for run in (batch.control, batch.treated))
        assert torch.equal(control, treated) and torch.equal(control, control[:1].expand(4, -1, -1))
    for run, side in zip((batch.control, batch.treated), sides, strict=True):
        alone = activations.clean_run(subject, side, shared=0)
        for name in ("tokens", *LAYERS, "calls"):
            torch.testing.assert_close(getattr(run, name), getattr(alone, name), rtol=1e-4, atol=1e-5)


def test_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, ids = from_model(tiny_model("llama")), tokens(3, 12)
    ids[:, :9] = ids[0, :9]
    assert activations.shared_prefix(subject, ids) == 0, "layers so small that calling them costs most"
    share_always(monkeypatch)
    assert activations.shared_prefix(subject, ids) == 9
    assert activations.shared_prefix(subject, ids[:1].expand(3, -1)) == 11, "each row computes its last token"
    assert activations.shared_prefix(subject, ids, ids.roll(1, 1)) == 0
    assert activations.shared_prefix(replace(subject, facts=None), ids) == 0, "not known to be exact"
    with activations.on_output(subject.layers[1].mlp, lambda x: x):
        assert activations.shared_prefix(subject, ids) == 0, "hooks may tell rows apart"
    weights = sum(p.numel() for p in subject.layers[0].block.parameters())
    monkeypatch.setattr(activations, "PAYS", {"cpu": 18 * weights})
    assert [activations.shared_prefix(subject, some) for some in (ids, ids[:2], ids[:, 1:])] == [9, 0, 0]
    assert activations.shared_prefix(subject, ids[:2], ids[1:2]) == 9, "both sides are made in one call"


def test_a_model_whose_prefix_hangs_on_what_follows_is_refused() -> None:
    subject = tiny_subject("llama")
    block = subject.layers[1].block
    plain = block.forward
    block.forward = lambda hidden_states, **kwargs: plain(hidden_states, **kwargs) * hidden_states.shape[1] / 10
    with pytest.raises(InputError, match="behind a prefix that is computed once"):
        verify.check_shared_prefix(subject, tokens(2, 10))


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "mistral", "llama"])
def test_what_is_not_live_changes_no_bit_of_an_answer_and_what_is_does(family: str) -> None:
    """Another residual stream at one cell: the logits of the last token of the prompt and of three tokens behind it."""
    subject, n = tiny_subject(family), 11
    ids = tokens(1, n + 3, seed=5)
    live = activations.live_positions(activations.clean_run(subject, ids[:, :n], keep=("cache",)))

    def logits(layer: int, position: int, size: float = 3.0) -> torch.Tensor:
        push = size * torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1))
        hook = activations.on_output(
            subject.layers[layer].block, lambda x: x.index_add(1, torch.tensor([position]), push)
        )
        with torch.no_grad(), hook:
            return subject.model(ids).logits[0, n - 1 :]

    plain = logits(0, 0, size=0.0)
    found = np.array([[not torch.equal(logits(i, j), plain) for j in range(n)] for i in range(subject.n_layers)])
    assert (found == live).all() and live[0].sum() > live[-1].sum() == 1


# ---- readout ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_log_probabilities_are_the_librarys(family, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    subject, rows = tiny_subject(family, dtype), torch.tensor([3, 60, 4])
    base, source = runs(subject)
    own, other = base.resid_post[3], source.resid_post[3]
    plain = subject.model(base.tokens).logits
    torch.testing.assert_close(readout.logits(subject, own), plain)
    torch.testing.assert_close(readout.logits(subject, own, rows), plain[..., rows])
    frozen, foreign = (readout.logits(subject, resid, rows, norm_like=own) for resid in (own, other))
    torch.testing.assert_close(frozen, plain[..., rows], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(foreign, readout.logits(subject, other, rows), atol=1e-3)
    for factor in (1, 1000) if dtype == torch.float64 else ():
        with torch.no_grad():
            subject.unembed.weight.mul_(factor)
        for resid in (own, other):
            wanted = readout.logits(subject, resid).log_softmax(-1)
            for row in rows.tolist():
                got = readout.token_log_probs(subject, resid, torch.full(resid.shape[:-1], row))
                torch.testing.assert_close(got, wanted[..., row], rtol=1e-10, atol=1e-10)


class Bare(nn.Module):
    """A norm without weights that does not say its epsilon, as OLMo 1's (centred) and others' (not)."""

    def __init__(self, centred: bool, eps: float) -> None:
        super().__init__()
        self.centred, self.hidden_eps = centred, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.hidden_eps)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_norm_without_weights_has_gain_1_and_its_epsilon_is_found(centred: bool, eps: float) -> None:
    norm = Bare(centred, eps)
    gain, bias, found = readout.norm_gain(norm)
    assert (gain.item(), bias, found, readout.is_centred(norm)) == (1.0, None, eps, centred)
    x = 1e-3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(readout.frozen_norm(norm, x, x), norm(x))
    with pytest.raises(InputError, match="Tanh is neither a LayerNorm nor an RMSNorm"):
        readout.norm_gain(nn.Tanh())
