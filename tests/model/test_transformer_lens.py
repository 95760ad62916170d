"""The grid against TransformerLens, the tool that readers know; and the trap in one of its hooks."""

from functools import partial

import pytest
import torch
from families import FAMILIES, VOCAB, tiny_model, tiny_tokenizer
from grid_tools import mask, runs
from torch import Tensor

from benchmarks.tools import bridge
from companion.base.errors import InputError
from companion.model import readout, replay
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.model.load import from_model

HOOKS = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "head": "attn.hook_z",
         "neuron": "mlp.hook_post"}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return from_model(tiny_model(request.param, attention="eager"), tokenizer, request.param)


def test_patching_by_transformer_lens_gives_the_same_logits(subject: Subject) -> None:
    """Every site at every layer, patched at the last token the way TransformerLens documents it."""
    base, source = runs(subject)
    lens = bridge(subject)
    _, cache = lens.run_with_cache(source.tokens)
    index = {"head": 1, "neuron": 7}
    patches = [Patch(site, layer, mask([8]), index.get(site)) for site in HOOKS for layer in range(4)]
    fast = readout.logits(subject, replay.interchange(subject, base, source, patches))[:, :, 0]
    for i, patch in enumerate(patches):
        name = f"blocks.{patch.layer}.{HOOKS[patch.site]}"
        hook = partial(set_cell, cache[name], (slice(None), -1, slice(None) if patch.index is None else patch.index))
        plain = lens.run_with_hooks(base.tokens, fwd_hooks=[(name, hook)])[:, -1]
        torch.testing.assert_close(fast[:, i], plain, rtol=0, atol=1e-5, msg=f"{patch.site} {patch.layer}")


def set_cell(clean: Tensor, cell: tuple, value: Tensor, hook: object) -> Tensor:
    value = value.clone()
    value[cell] = clean[cell]
    return value


def test_hook_resid_mid_misses_the_skip_path(subject: Subject) -> None:
    """A tensor returned at `hook_resid_mid` reaches the MLP but not the residual stream; written in place it does.

    It is all that the rest of the layer sees, so setting it to the source's at the last layer must give the source's outcome.
    """
    base, source = runs(subject)
    lens, name = bridge(subject), "blocks.3.hook_resid_mid"
    wanted, cache = lens.run_with_cache(source.tokens)
    clean = cache[name].clone()

    def in_place(value: Tensor, hook: object) -> None:
        value.copy_(clean)

    hooks = (lambda value, hook: clean.clone(), in_place)
    returned, written = (lens.run_with_hooks(base.tokens, fwd_hooks=[(name, hook)])[:, -1] for hook in hooks)
    torch.testing.assert_close(written, wanted[:, -1], rtol=0, atol=1e-5)
    assert float((returned - wanted[:, -1]).detach().abs().max()) > 0.1


def test_the_bridge_is_a_twin_that_shares_weights(subject: Subject) -> None:
    ids = torch.arange(3, 12)[None]
    before = subject.model(ids).logits
    lens = bridge(subject)
    assert lens.original_model is not subject.model
    assert lens.original_model.get_output_embeddings().weight is subject.unembed.weight
    assert torch.equal(subject.model(ids).logits, before)
    assert lens(ids).shape[-1] == VOCAB
    with pytest.raises(InputError, match="has no tokenizer"):
        bridge(from_model(tiny_model("llama")))
