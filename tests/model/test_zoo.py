"""Every architecture that is tried is exact at every site, or refused in one sentence; TransformerLens agrees; and every effect
of the real model with an adapter is that of one full forward pass of the plain library under plain hooks.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from models import FAMILIES, VOCAB, tiny_model, tiny_tokenizer, tokens
from oracles import log_odds, mask, runs, true_float64
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.tools import bridge
from companion.base import smollm2
from companion.base.errors import InputError
from companion.mediation import estimands
from companion.mediation.estimands import Mediator
from companion.model import readout, replay
from companion.model.activations import clean_run
from companion.model.architecture import Subject
from companion.model.interventions import SITES, Patch, position_mask
from companion.model.load import from_model, load
from companion.prompts.pairs import load_set
from companion.prompts.tokens import Openers, TokenPair, openers, tokenize

# ---- zoo ----

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "n_embd": 32, "num_hidden_layers": 3, "n_layer": 3, "num_attention_heads": 4,
    "n_head": 4, "num_key_value_heads": 2, "intermediate_size": 48, "n_inner": 48, "max_position_embeddings": 64,
    "n_positions": 64, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "sliding_window": 4, "query_pre_attn_scalar": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
PARALLEL, EXPERTS, UNKNOWN = "parallel residual", "a mixture of experts", "unknown architecture"
PARTS = "put together in a way"
HALF_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 6}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip

# Type of the configuration, what is changed in it, and the refusal that is expected ("" for an exact replay).
TRIED: list[tuple[str, dict[str, Any], str]] = [
    ("apertus", {}, ""), ("arcee", {}, ""), ("cwm", {}, ""), ("ernie4_5", {}, ""), ("exaone4", {}, ""), ("gemma", {}, ""),
    ("gemma2", {}, ""), ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}, ""),
    ("gemma3_text", {}, ""), ("gemma3_text", {"layer_types": HALF_WINDOWS}, ""), ("glm", {}, ""), ("gpt2", {}, ""),
    ("granite", {}, ""), ("granite", {"logits_scaling": 8.0}, "do not give the model's logits"),
    ("granite", {"residual_multiplier": 0.22}, PARTS), ("helium", {}, ""), ("hunyuan_v1_dense", {}, ""), ("jais2", {}, ""),
    ("llama", {}, ""), ("llama", {"num_key_value_heads": 1}, ""), ("llama", {"attention_bias": True, "mlp_bias": True}, ""),
    ("llama", {"tie_word_embeddings": True}, ""), ("llama", {"rope_parameters": LLAMA3}, ""), ("ministral", {}, ""),
    ("ministral3", {}, ""), ("mistral", {}, ""), ("nemotron", {}, ""), ("olmo", {}, ""), ("olmo2", {}, ""), ("olmo3", {}, ""),
    ("phi3", {}, ""), ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 6}, ""), ("qwen2", {}, ""),
    ("qwen2", {"layer_types": HALF_WINDOWS, "use_sliding_window": True}, ""), ("qwen3", {}, ""), ("seed_oss", {}, ""),
    ("smollm3", {}, ""), ("stablelm", {}, ""), ("stablelm", {"use_parallel_residual": True}, PARALLEL),
    ("starcoder2", {}, ""), ("vaultgemma", {}, ""), ("bitnet", {}, PARTS), ("cohere", {}, PARALLEL),
    ("cohere2", {}, PARALLEL), ("diffllama", {}, PARTS), ("glm4", {}, PARTS), ("gpt_bigcode", {}, "cannot be replayed from one"),
    ("gpt_neox", {}, UNKNOWN), ("gptj", {}, UNKNOWN), ("bloom", {}, UNKNOWN), ("opt", {}, UNKNOWN), ("phi", {}, UNKNOWN),
    ("mixtral", {}, EXPERTS), ("olmoe", {}, EXPERTS), ("qwen2_moe", {}, EXPERTS), ("qwen3_moe", {}, EXPERTS),
]  # fmt: skip


def tiny(kind: str, changes: dict[str, Any]) -> hf.PreTrainedModel:
    """A random model in float64, its weights far enough from 0 that effects are far above rounding."""
    config_class = CONFIG_MAPPING[kind]
    plain, alias = config_class(), getattr(config_class, "attribute_map", {})
    known = {*plain.to_dict(), *alias} - {alias[name] for name in SMALL if name in alias}
    small = {name: size for name, size in SMALL.items() if name in known}
    config = config_class(**small | changes)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:3]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.1))
    return model.double().eval()


def test_as_many_as_the_readme_says() -> None:
    assert len({kind for kind, _, refusal in TRIED if not refusal}) == 30  # architectures that are exact


IDS = ["-".join([kind, *changes, "refused" if refusal else "exact"]) for kind, changes, refusal in TRIED]


@pytest.mark.parametrize(("kind", "changes", "refusal"), TRIED, ids=IDS)
def test_exact_at_every_site_or_refused(kind: str, changes: dict[str, Any], refusal: str) -> None:
    model = tiny(kind, changes)
    if refusal:
        with pytest.raises(InputError, match=refusal):
            from_model(model)
        return
    subject = from_model(model)
    base, source = clean_run(subject, tokens(2, 9, 0)), clean_run(subject, tokens(2, 9, 1))
    which = {"head": range(subject.n_heads), "neuron": (0, 17, subject.d_mlp - 1)}
    patches = [
        Patch(site, layer, position_mask(base.tokens, position), index)
        for site in SITES
        for layer in range(subject.n_layers)
        for position in (0, 4, 8)
        for index in which.get(site, (None,))
    ]
    fast = replay.interchange(subject, base, source, patches, range(9))
    plain = replay.interchange_full_forward(subject, base, source, patches, range(9))
    effects = (plain - base.resid_post[-1][:, None]).abs().amax((0, 2, 3))
    assert float((fast - plain).abs().max()) < 1e-6 * float(plain.abs().max())  # the library's norms cast to float32
    changed = effects[[patch.site != "neuron" for patch in patches]]  # a neuron may be silent in both runs
    assert float(changed.min()) > 1e-5 * float(effects.max()), "a patch that changes nothing proves nothing"


# ---- transformer lens ----

HOOKS = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "head": "attn.hook_z",
         "neuron": "mlp.hook_post"}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return from_model(tiny_model(request.param, attention="eager"), tokenizer, request.param)


def test_patching_by_transformer_lens_gives_the_same_logits(subject: Subject) -> None:
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


# ---- smollm2 ----


@pytest.fixture(scope="module")
def fetched() -> None:
    try:
        smollm2.fetch_smollm2()
    except InputError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


def plain_effects(
    model: nn.Module, pairs: Sequence[TokenPair], openers: Openers, wanted: Sequence[Mediator]
) -> tuple[Tensor, Tensor, Tensor]:
    """Total effects [pair], NIE0 and NIE1 [pair, mediator]: a forward pass of whole prompts for each cell."""
    control, treated = (torch.tensor([getattr(p, side).tolist() for p in pairs]) for side in ("control", "treated"))

    def run(ids: Tensor, values: dict[Mediator, Tensor]) -> tuple[Tensor, dict[Mediator, Tensor]]:
        """The outcome with these values at the last token, and what all mediators had there."""
        seen: dict[Mediator, Tensor] = {}

        def act(at: Mediator, _: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple:
            own = (output[0] if isinstance(output, tuple) else output).clone()
            seen[at] = own[:, -1].clone()
            own[:, -1] = values.get(at, own[:, -1])
            return (own, *output[1:]) if isinstance(output, tuple) else own

        with ExitStack() as stack:
            for one in wanted:
                layer = model.model.layers[one.layer]
                module = {"resid_post": layer, "attn_out": layer.self_attn, "mlp_out": layer.mlp}[one.site]
                stack.enter_context(module.register_forward_hook(partial(act, one)))
            return log_odds(model(ids, use_cache=False, logits_to_keep=1).logits[:, -1], openers), seen

    with torch.no_grad():
        (y00, at0), (y11, at1) = run(control, {}), run(treated, {})
        nie0 = [run(control, {one: at1[one]})[0] - y00 for one in wanted]
        nie1 = [y11 - run(treated, {one: at0[one]})[0] for one in wanted]
    return y11 - y00, torch.stack(nie0, 1), torch.stack(nie1, 1)


# In float64 all 30 layers, even ones on a pair of T1, odd ones on a pair of T2; in float32 (two minutes) to its measured noise.
@pytest.mark.parametrize(("dtype", "n", "layers"), [
    ("float32", 5, {"T1": (3, 15, 29), "T2": (3, 15, 29)}), ("float64", 1, {"T1": range(0, 30, 2), "T2": range(1, 30, 2)}),
])  # fmt: skip
def test_every_effect_of_smollm2_is_that_of_plain_forward_passes(fetched, dtype: str, n: int, layers: dict) -> None:
    subject, content = load(smollm2.REFUSES, dtype=dtype), load_set("english")
    pairs, _ = tokenize([pair for pair in content.pairs if pair.treatment in layers], subject.tokenizer)
    camps = openers(content, subject.tokenizer, len(subject.unembedding[0]))
    assert 1e-8 < subject.facts.noise < 1e-5, (
        "rounding of float32, inside norms alone or everywhere, as it was measured"
    )
    with true_float64(subject.model) if dtype == "float64" else nullcontext():
        for treatment, some in layers.items():
            kinds = {
                (p.pair.topic, len(p.control)): p for p in pairs if p.pair.treatment == treatment
            }  # no two of a topic
            groups = estimands.batches(list(kinds.values()), size=n)  # the shortest first
            chosen, used = next(group for group in groups if len(group) == n), camps[treatment]
            assert used.rest and len(used.comply) == 49151
            wanted = [Mediator(site, layer) for site in ("resid_post", "attn_out", "mlp_out") for layer in some]
            table = estimands.measure_effects(subject, chosen, camps, wanted)
            found = [torch.tensor(table[name].to_numpy().reshape(n, -1)) for name in ("te", "nie0", "nie1")]
            te, nie0, nie1 = plain_effects(subject.model, chosen, used, wanted)
            assert te.abs().mean() > 0.5 and min(nie0.abs().max(), nie1.abs().max()) > 0.5 * te.abs().max()
            off = max((own - plain).abs().max() for own, plain in zip(found, (te[:, None], nie0, nie1), strict=True))
            assert off / te.abs().mean() < (1e-9 if dtype == "float64" else subject.facts.tolerance)
