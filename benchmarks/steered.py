"""Steered greedy decoding: a batch of prompts with one vector added, against the library's `generate` with and without a hook.

The vector is the mean difference between the two kinds of prompts, added after a middle layer at all tokens of the prompt,
where this repository's steering acts. All prompts of a batch have one length; no end token stops an answer early.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from benchmarks.shapes import Case
from companion.base.device import to_host
from companion.generation.decode import Begun, decode
from companion.generation.forward import read_prompts
from companion.generation.hooks import Edit, Steering
from companion.model.activations import clean_run, on_output
from companion.steering.methods import constant

STEPS = 16
PLAIN = "generate, not steered"
Decode = Callable[[Int[Tensor, "prompt pos"]], Int[Tensor, "prompt step"]]


def decoders(case: Case) -> Iterator[tuple[str, str, Decode]]:
    """Tool, setting and what decodes: ours first when prompts are new to it, then when it still has their plain run."""
    subject, layer = case.subject, case.shape.n_layers // 2
    control, treated = next(iter(case.pairs.values()))
    means = [clean_run(subject, side, keep=("resid",)).resid_post[layer][:, -1].mean(0) for side in (control, treated)]
    vector = means[1] - means[0]
    steering = Steering("mean difference", (Edit(layer, "resid_post", constant(to_host(vector)), blind=True),))
    greedy = GenerationConfig(max_new_tokens=STEPS, do_sample=False, pad_token_id=0, eos_token_id=case.shape.vocabulary)

    def ours(ids: Tensor) -> Tensor:
        def go_on(rows: Tensor, logits: Tensor, cache: Any) -> Tensor:
            begun = Begun(to_host(rows), logits, cache, torch.full((len(rows),), ids.shape[1]))
            likeliest = lambda logits, places, step: logits.argmax(-1)  # noqa: E731
            return torch.tensor(decode(subject, begun, STEPS, ids.new_empty(0), likeliest, shrink=False))

        return read_prompts(subject, ids, [steering], go_on)[0]

    def generate(ids: Tensor) -> Tensor:
        with torch.no_grad():
            mask = torch.ones_like(ids)
            return subject.model.generate(ids, attention_mask=mask, generation_config=greedy)[:, ids.shape[1] :]

    def hooked(ids: Tensor) -> Tensor:
        def add(hidden: Tensor) -> Tensor | None:
            return hidden + vector if hidden.shape[1] > 1 else None

        with on_output(subject.layers[layer].block, add):
            return generate(ids)

    yield "this repository", "new prompts", ours
    yield "this repository", "prompts read before", ours
    yield PLAIN, "", generate
    yield "generate with a hook", "", hooked
