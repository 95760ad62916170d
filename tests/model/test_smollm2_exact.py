"""The real model with an adapter: every effect is that of one full forward pass of the plain library under plain hooks.

Float64 is held to 1e-9 of the total effect on all 30 layers (even ones on a pair of T1, odd ones on a pair of T2), float32 to the
noise that was measured at load, on ten pairs and three layers: two minutes of one core.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import log_odds, true_float64
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.base import smollm2
from companion.base.errors import InputError
from companion.base.files import write_json
from companion.base.folders import ADAPTER, ADAPTER_WEIGHTS, with_adapter
from companion.mediation import estimands
from companion.mediation.estimands import Mediator
from companion.model.architecture import Subject
from companion.model.load import load
from companion.prompts import tokens
from companion.prompts.pairs import load_set
from companion.prompts.tokens import TokenPair

SITES = ("resid_post", "attn_out", "mlp_out")


@pytest.fixture(scope="module", autouse=True)
def fetched() -> Path:
    try:
        return smollm2.fetch_smollm2()
    except InputError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def refuser() -> Subject:
    return load(smollm2.REFUSES)


def english(subject: Subject) -> tuple[list[TokenPair], dict[str, tokens.Openers]]:
    content = load_set("english")
    pairs, _ = tokens.tokenize([pair for pair in content.pairs if pair.treatment in ("T1", "T2")], subject.tokenizer)
    return pairs, tokens.openers(content, subject.tokenizer, len(subject.unembedding[0]))


def of_one_length(pairs: Sequence[TokenPair], treatment: str, n: int) -> list[TokenPair]:
    """Some pairs of a treatment, of the shortest length that enough of them have, no two of a topic."""
    found = list({p.pair.topic + str(len(p.control)): p for p in pairs if p.pair.treatment == treatment}.values())
    counts = Counter(len(pair.control) for pair in found)
    length = min(length for length, count in counts.items() if count >= n)
    return [pair for pair in found if len(pair.control) == length][:n]


def plain_effects(
    model: nn.Module, pairs: Sequence[TokenPair], openers: tokens.Openers, wanted: Sequence[Mediator]
) -> tuple[Tensor, Tensor, Tensor]:
    """Total effects [pair], NIE0 and NIE1 [pair, mediator]: a forward pass of whole prompts for each cell."""
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    control, treated = (
        torch.tensor([getattr(pair, side).tolist() for pair in pairs]) for side in ("control", "treated")
    )
    modules = {
        "resid_post": lambda layer: layer,
        "attn_out": lambda layer: layer.self_attn,
        "mlp_out": lambda layer: layer.mlp,
    }

    def run(
        ids: Tensor, one: Mediator | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, dict[Mediator, Tensor]]:
        seen: dict[Mediator, Tensor] = {}

        def hook(at: Mediator) -> Callable[..., Any]:
            def act(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
                own = output[0] if isinstance(output, tuple) else output
                if value is None:
                    seen[at] = own[:, -1].clone()
                    return None
                changed = own.clone()
                changed[:, -1] = value
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return act

        hooked = wanted if one is None else [one]
        handles = [modules[m.site](layers[m.layer]).register_forward_hook(hook(m)) for m in hooked]
        try:
            return log_odds(model(ids, use_cache=False, logits_to_keep=1).logits[:, -1], openers), seen
        finally:
            for handle in handles:
                handle.remove()

    with torch.no_grad():
        (y00, at0), (y11, at1) = run(control), run(treated)
        nie0 = [run(control, one, at1[one])[0] - y00 for one in wanted]
        nie1 = [y11 - run(treated, one, at0[one])[0] for one in wanted]
    return y11 - y00, torch.stack(nie0, 1), torch.stack(nie1, 1)


def worst(
    subject: Subject, pairs: Sequence[TokenPair], openers: dict[str, tokens.Openers], layers: Sequence[int],
    model: nn.Module | None = None,
) -> float:  # fmt: skip
    """The largest difference between the library's effects and plain ones, as a share of the mean size of a total effect."""
    wanted, used = [Mediator(site, layer) for site in SITES for layer in layers], openers[pairs[0].pair.treatment]
    assert used.rest and len(used.comply) == 49151
    table = estimands.measure_effects(subject, pairs, openers, wanted)
    found = [torch.tensor(table[name].to_numpy().reshape(len(pairs), -1)) for name in ("te", "nie0", "nie1")]
    te, nie0, nie1 = plain_effects(model or subject.model, pairs, used, wanted)
    assert te.abs().mean() > 0.5 and min(nie0.abs().max(), nie1.abs().max()) > 0.5 * te.abs().max()
    off = [(found[0][:, 0] - te).abs().max(), (found[1] - nie0).abs().max(), (found[2] - nie1).abs().max()]
    return float(max(off) / te.abs().mean())


def test_float32_is_exact_up_to_measured_noise(refuser: Subject) -> None:
    pairs, openers = english(refuser)
    assert 1e-8 < refuser.facts.noise < 1e-5, "rounding of float32 as it was measured"
    for treatment in ("T1", "T2"):
        some = of_one_length(pairs, treatment, 5)
        assert worst(refuser, some, openers, (3, 15, 29)) < refuser.facts.tolerance


def test_float64_is_exact_on_every_layer() -> None:
    subject = load(smollm2.REFUSES, dtype="float64")
    pairs, openers = english(subject)
    with true_float64(subject.model):
        for i, treatment in enumerate(("T1", "T2")):
            assert worst(subject, of_one_length(pairs, treatment, 1), openers, range(i, 30, 2)) < 1e-9


def test_any_adapter_by_its_folder_is_the_model_with_it_beside(tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
    }  # fmt: skip
    write_json(config | {"layers_to_transform": [3, 20]}, tmp_path / ADAPTER)
    draw, held = torch.Generator().manual_seed(0), {}
    for layer in (3, 20):
        for module, n_in, n_out in (("self_attn.q_proj", 576, 576), ("mlp.down_proj", 1536, 576)):
            name = f"base_model.model.model.layers.{layer}.{module}"
            held[f"{name}.lora_A.weight"] = torch.randn(2, n_in, generator=draw) / n_in**0.5
            held[f"{name}.lora_B.weight"] = torch.randn(n_out, 2, generator=draw) / 4
    save_file(held, tmp_path / ADAPTER_WEIGHTS)
    subject, plain = load(with_adapter("smollm2", tmp_path)), load("smollm2")
    pairs, openers = english(subject)
    some, ids = of_one_length(pairs, "T1", 2), torch.tensor([pairs[0].control.tolist()])
    with torch.no_grad():
        assert (subject.model(ids).logits - plain.model(ids).logits).abs().max() > 0.5, "it changes the model"
    beside = PeftModel.from_pretrained(plain.model, str(tmp_path)).eval()
    assert worst(subject, some, openers, (3, 20, 29), beside) < subject.facts.tolerance
