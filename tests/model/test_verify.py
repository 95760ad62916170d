"""The self-check: what it refuses, and the slow path that serves a refused model."""

import types
from dataclasses import replace

import pytest
import torch
import transformers as hf
from families import FAMILIES, tiny_model, tiny_subject
from grid_tools import every_patch, mask, runs

from companion.base.errors import InputError
from companion.model import reference, replay
from companion.model.architecture import find_parts
from companion.model.interventions import Patch
from companion.model.load import from_model
from companion.model.verify import check_sites, grid_refusal, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    assert from_model(tiny_model(family, dtype)).replayable


def scaled_block(model: hf.PreTrainedModel) -> None:
    """A hidden factor on a block's output: what the hooks see is not what is added."""
    block = model.model.layers[2]
    plain = block.forward
    block.forward = lambda hidden_states, **kwargs: 0.9 * plain(hidden_states, **kwargs)


def position_counter(model: hf.PreTrainedModel) -> None:
    """Attention that scales by the length of what it is given: right in a full forward, wrong in a replay."""
    attn = model.model.layers[1].self_attn
    plain = type(attn).forward

    def forward(self, hidden_states, **kwargs):
        out, weights = plain(self, hidden_states, **kwargs)
        return out * hidden_states.shape[1] / 10, weights

    attn.forward = types.MethodType(forward, attn)


def scaled_logits(model: hf.PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda _, __, out: 0.5 * out)


def nan_weight(model: hf.PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scaled_block, "resid_pre [+] attn_out [+] mlp_out is not resid_post in layer 2"),
        (position_counter, "a replay of its layers differs from the model itself .* load it with allow_slow=True"),
        (scaled_logits, "do not give the model's logits"),
        (nan_weight, "NaN or infinity"),
    ],
)
def test_what_cannot_be_replayed_is_refused(spoil, message: str) -> None:
    model = tiny_model("llama")
    from_model(model)
    spoil(model)
    with pytest.raises(InputError, match=message):
        from_model(model)


def test_nan_fails_every_comparison() -> None:
    subject = tiny_subject("llama")
    run = runs(subject)[0]
    check_sites(subject, run)
    spoiled = replace(run, mlp_out=(*run.mlp_out[:2], run.mlp_out[2] * float("nan"), run.mlp_out[3]))
    with pytest.raises(InputError, match="off by nan of"):
        check_sites(subject, spoiled)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_flash_and_flex_attention_are_refused_with_what_to_do(name: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = name
    assert "attn_implementation='sdpa' or 'eager'" in str(grid_refusal(find_parts(model, None, "flash")))


def test_mixture_of_experts_takes_the_slow_path() -> None:
    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="mixtures of experts are not replayed yet"):
        from_model(model)
    with pytest.warns(UserWarning, match="going on with one full forward pass"):
        subject = from_model(model, allow_slow=True)
    assert not subject.replayable
    pair = runs(subject)
    patches = [Patch("mlp_out", 1, mask([8])), Patch("head", 0, mask([4]), 2)]
    with pytest.warns(UserWarning, match="18 times slower for last-token patches"):
        got = replay.interchange(subject, *pair, patches)
    assert torch.equal(got, reference.interchange_full_forward(subject, *pair, patches))
    with pytest.raises(InputError, match="no down projection"):
        replay.interchange(subject, *pair, [Patch("neuron", 0, mask([4]), 0)])


def test_slow_path_serves_a_model_that_the_replay_gets_wrong() -> None:
    model = tiny_model("llama")
    position_counter(model)
    with pytest.warns(UserWarning, match="going on with one full forward pass"):
        subject = from_model(model, allow_slow=True)
    pair = runs(subject)
    with pytest.warns(UserWarning, match="cannot be replayed exactly"):
        got = replay.interchange(subject, *pair, every_patch((1,))[:4])
    assert torch.isfinite(got).all()


def test_verify_leaves_the_model_as_it_was() -> None:
    subject = tiny_subject("gemma3")
    verify(subject)
    for module in subject.model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
