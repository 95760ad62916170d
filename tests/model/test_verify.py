"""The self-check: what it refuses, and the slow path that serves a refused model."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from families import FAMILIES, tiny_model, tiny_subject
from grid_tools import mask, runs

from companion.base.errors import InputError
from companion.model import reference, replay
from companion.model.interventions import Patch
from companion.model.load import from_model
from companion.model.verify import check_sites, replay_refusal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    subject = from_model(tiny_model(family, dtype))
    assert subject.replayable
    for module in subject.model.modules():  # which the check leaves as it was
        assert not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def scaled_block(model: hf.PreTrainedModel) -> None:
    """A hidden factor on a block's output: what the hooks see is not what is added."""
    block, plain = model.model.layers[2], model.model.layers[2].forward
    block.forward = lambda hidden_states, **kwargs: 0.9 * plain(hidden_states, **kwargs)


def position_counter(model: hf.PreTrainedModel) -> None:
    """Attention that scales by the length of what it is given: right in a full forward, wrong in a replay."""
    attn = model.model.layers[1].self_attn
    plain = attn.forward
    attn.forward = lambda hidden_states, **more: (plain(hidden_states, **more)[0] * hidden_states.shape[1] / 10, None)


def scaled_logits(model: hf.PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda _, __, out: 0.5 * out)


def nan_weight(model: hf.PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")


def other_reader(model: hf.PreTrainedModel) -> None:
    """An MLP that also reads the stream below the block: the block's sum holds, what the MLP reads is another thing."""
    block, seen = model.model.layers[1], []
    block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.mlp.register_forward_pre_hook(lambda _, args: (args[0] + 0.5 * seen[-1],))


def swapped_heads(model: hf.PreTrainedModel) -> None:
    """Entries of two heads lie interleaved in the output projection's input."""
    o_proj = model.model.layers[2].self_attn.o_proj
    o_proj.register_forward_pre_hook(lambda _, args: (args[0].view(*args[0].shape[:2], 4, 8).mT.flatten(2),))


def curved_projection(model: hf.PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, out: out + 0.1 * out.pow(2))


SPOILED = [
    (scaled_block, "resid_pre [+] attn_out [+] mlp_out is not resid_post in layer 2"),
    (position_counter, "a replay of its layers differs from the model itself .* load it with allow_slow=True"),
    (scaled_logits, "do not give the model's logits"),
    (nan_weight, "NaN or infinity"),
    (other_reader, "the MLP, given the stream behind attention, writes something else in layer 1"),
    (swapped_heads, "the heads of layer 2 do not lie side by side"),
    (curved_projection, "mlp_out is no linear map of neuron entries in layer 0"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_what_cannot_be_replayed_is_refused(spoil, message: str) -> None:
    model = tiny_model("llama")
    spoil(model)
    with pytest.raises(InputError, match=message):
        from_model(model)


def test_nan_fails_every_comparison_and_flash_attention_is_refused() -> None:
    subject = tiny_subject("llama")
    run = runs(subject)[0]
    check_sites(subject, run)
    spoiled = replace(run, mlp_out=(*run.mlp_out[:2], run.mlp_out[2] * float("nan"), run.mlp_out[3]))
    with pytest.raises(InputError, match="off by nan of"):
        check_sites(subject, spoiled)
    for name in ("flash_attention_2", "flex_attention"):
        subject.model.config._attn_implementation_internal = name
        assert "attn_implementation='sdpa' or 'eager'" in str(replay_refusal(subject))


def experts() -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = hf.Qwen2MoeConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, decoder_sparse_step=1,
    )  # fmt: skip
    return hf.AutoModelForCausalLM.from_config(config)


def test_a_mixture_of_experts_and_what_a_replay_gets_wrong_take_the_slow_path() -> None:
    patches = [Patch("mlp_out", 1, mask([8])), Patch("head", 0, mask([4]), 2)]
    position_counter(counter := tiny_model("llama"))
    for model in (counter, experts()):
        with pytest.warns(UserWarning, match="going on with one full forward pass"):
            subject = from_model(model, allow_slow=True)
        assert not subject.replayable
        pair = runs(subject)
        with pytest.warns(UserWarning, match="cannot be replayed exactly.* 18 times slower for last-token patches"):
            got = replay.interchange(subject, *pair, patches)
        assert torch.equal(got, reference.interchange_full_forward(subject, *pair, patches))
    with pytest.raises(InputError, match="no down projection"):
        replay.interchange(subject, *pair, [Patch("neuron", 0, mask([4]), 0)])


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
    assert json.loads(json.dumps(facts.manifest()))
