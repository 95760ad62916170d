"""The self-check: what it refuses, and what it finds out."""

import json
import types
from dataclasses import replace

import pytest
import torch
import transformers as hf
from families import FAMILIES, tiny_model, tiny_subject
from grid_tools import runs

from companion.base.errors import InputError
from companion.model.architecture import find_parts
from companion.model.load import from_model
from companion.model.verify import check_sites, replay_refusal, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    from_model(tiny_model(family, dtype))


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


def other_reader(model: hf.PreTrainedModel) -> None:
    """An MLP that also reads the stream below the block: the block's sum holds, what the MLP reads is another thing."""
    block = model.model.layers[1]
    seen = []
    block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.mlp.register_forward_pre_hook(lambda _, args: (args[0] + 0.5 * seen[-1],))


def swapped_heads(model: hf.PreTrainedModel) -> None:
    """Entries of two heads lie interleaved in the output projection's input."""
    o_proj = model.model.layers[2].self_attn.o_proj
    o_proj.register_forward_pre_hook(lambda _, args: (args[0].view(*args[0].shape[:2], 4, 8).mT.flatten(2),))


def curved_projection(model: hf.PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: out + 0.1 * out.pow(2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scaled_block, "resid_pre [+] attn_out [+] mlp_out is not resid_post in layer 2"),
        (position_counter, "a replay of its layers differs from the model itself .* use a model of a known family"),
        (scaled_logits, "do not give the model's logits"),
        (nan_weight, "NaN or infinity"),
        (other_reader, "the MLP, given the stream behind attention, writes something else in layer 1"),
        (swapped_heads, "the heads of layer 2 do not lie side by side"),
        (curved_projection, "mlp_out is no linear map of neuron entries in layer 0"),
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
    assert "attn_implementation='sdpa' or 'eager'" in str(replay_refusal(find_parts(model, None, "flash")))


def test_a_mixture_of_experts_is_refused() -> None:
    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="a mixture of experts"):
        from_model(model)


def test_the_facts_say_what_was_found() -> None:
    facts = from_model(tiny_model("gemma2")).facts
    assert facts is not None and (facts.windows, facts.soft_cap, facts.norm_after) == ((3,), 5.0, True)
    assert (facts.heads, facts.key_heads, facts.tied, facts.ends) == (4, 2, False, {"2": ("generation config",)})
    assert 0 < facts.noise < 1e-5 and facts.tolerance == 1e-4
    found = facts.table().set_index("fact").found
    assert found["replay"] == "exact" and found["rounding noise"] == "below 1e-06 of the largest activation"
    assert found["layers, heads, width, neurons"] == "4, 4 on 2 keys, 32, 48"
    coarse = from_model(tiny_model("llama", torch.bfloat16)).facts
    assert coarse is not None and coarse.tolerance > 0.05  # 30 times the noise of that precision
    assert json.loads(json.dumps(facts.manifest())) == json.loads(json.dumps(facts.manifest()))


def test_verify_leaves_the_model_as_it_was() -> None:
    subject = tiny_subject("gemma3")
    verify(subject)
    for module in subject.model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
