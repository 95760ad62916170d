"""The real model with an adapter: every effect is that of one full forward pass of the plain library under plain hooks.

Float64 is held to 1e-9 of the total effect on all 30 layers (even ones on a pair of T1, odd ones on a pair of T2), float32 to the
noise that was measured at load, on ten pairs and three layers: two minutes of one core.
"""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import log_odds, true_float64
from torch import Tensor, nn

from companion.base import smollm2
from companion.base.errors import InputError
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
    control, treated = (
        torch.tensor([getattr(pair, side).tolist() for pair in pairs]) for side in ("control", "treated")
    )

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


def worst(
    subject: Subject, pairs: Sequence[TokenPair], openers: dict[str, tokens.Openers], layers: Sequence[int]
) -> float:
    """The largest difference between the library's effects and plain ones, as a share of the mean size of a total effect."""
    wanted, used = [Mediator(site, layer) for site in SITES for layer in layers], openers[pairs[0].pair.treatment]
    assert used.rest and len(used.comply) == 49151
    table = estimands.measure_effects(subject, pairs, openers, wanted)
    found = [torch.tensor(table[name].to_numpy().reshape(len(pairs), -1)) for name in ("te", "nie0", "nie1")]
    te, nie0, nie1 = plain_effects(subject.model, pairs, used, wanted)
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
