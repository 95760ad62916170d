"""A prefix that all rows share, computed once: every cell is the one that each row's own prefix gives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_model, tiny_subject, tokens
from grid_tools import every_patch, mask, worst
from handmade import random_pairs
from true_float64 import true_float64

from companion.base.errors import InputError
from companion.mediation import estimands
from companion.model import activations, replay, verify
from companion.model.interventions import Patch
from companion.model.load import from_model

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
def test_everything_kept_is_what_a_plain_run_keeps(family: str, attention: str | None) -> None:
    subject = tiny_subject(family, torch.float64, attention)
    with true_float64(subject.model):
        for n in (1, N_SHARED, 8):
            plain, once = (activations.clean_run(subject, sharing(n), shared=shared) for shared in (0, n))
            for name in replay.LAYERS:
                for own, got in zip(getattr(plain, name), getattr(once, name), strict=True):
                    torch.testing.assert_close(got, own, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(once.calls, plain.calls, rtol=0, atol=0)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_on_such_runs_are_exact(family: str, attention: str | None) -> None:
    """At the last token, at every position, in groups within the prefix and across its end."""
    subject = tiny_subject(family, torch.float64, attention)
    groups = [Patch("resid_post", 1, mask(columns)) for columns in ([1, 3], [4, 5], list(range(9)))]
    with true_float64(subject.model):
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
        for name in ("tokens", *replay.LAYERS, "calls"):
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
