"""Gate or contributor: tests on whole answers, teacher-forced: when a set acts, and what closing it costs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers import grid, outcomes
from helpers.gate_cells import NeuronSet
from helpers.grid import CleanRun, Patch
from helpers.mediation import batches, prompt_tokens
from helpers.progress import progress
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair

STEPS = 12  # tokens of an answer, its opener included


def timing(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], sets: Sequence[NeuronSet]
) -> pd.DataFrame:
    """Effect (mean of both directions, nats) of each set on log p(answer) - log p(refusal), teacher-forced.

    `first` clamps the set where the first answer token is decided only, `every` there and at every later answer token.
    Answer and refusal are the model's own words (`outcomes.continuations`), the same for all runs of a pair.
    """
    rows: list[tuple[object, ...]] = []
    for group in progress(batches(pairs, subject, mixed=True), desc="timing"):
        prompts = prompt_tokens(subject, group)
        texts = outcomes.continuations(subject, *prompts, [openers[pair.pair.treatment] for pair in group], STEPS)
        effect = _forced(subject, prompts, texts.answer, texts.answer_mask, sets)
        effect -= _forced(subject, prompts, texts.refusal, texts.refusal_mask, sets)
        for i, token_pair in enumerate(group):
            pair = token_pair.pair
            keys = (pair.id, pair.topic, pair.treatment, pair.split)
            rows += [(*keys, one.name, one.layer, *effect[i, k]) for k, one in enumerate(sets)]
    names = ["pair_id", "topic", "treatment", "split", "set", "layer", "first", "every"]
    return pd.DataFrame(rows, columns=names).assign(form="timing", outcome="Y2")


def _forced(
    subject: Subject,
    prompts: tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]],
    tokens: Int[Tensor, "pair step"],
    mask: Bool[Tensor, "pair step"],
    sets: Sequence[NeuronSet],
) -> Float[np.ndarray, "pair set when"]:
    """Effects on log p of one continuation, clamped at the first or at every one of its tokens."""
    start, n_steps = prompts[0].shape[1] - 1, tokens.shape[1]
    runs = [grid.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1)) for prompt in prompts]
    patches = [
        Patch("neuron", one.layer, _between(runs[0], start, end), one.neurons)
        for one in sets
        for end in (start + 1, start + n_steps)
    ]
    read = range(start, start + n_steps)
    both = []
    for base, source, sign in ((runs[0], runs[1], 1), (runs[1], runs[0], -1)):
        clean = outcomes.sequence_log_prob(subject, base.resid_post[-1][:, None, list(read)], tokens, mask)
        resid = grid.interchange(subject, base, source, patches, read=tuple(read))
        both.append(sign * (outcomes.sequence_log_prob(subject, resid, tokens, mask) - clean))
    effect = (both[0] + both[1]) / 2
    return effect.reshape(len(tokens), len(sets), 2).cpu().numpy()


def _between(run: CleanRun, start: int, end: int) -> Bool[Tensor, "pair pos"]:
    mask = torch.zeros_like(run.tokens, dtype=torch.bool)
    mask[:, start:end] = True
    return mask


Closed = dict[NeuronSet, Float[Tensor, "run neuron"]]


def closed_values(subject: Subject, pairs: Sequence[TokenPair], sets: Sequence[NeuronSet]) -> Closed:
    """Each set's values at the last token of the control prompts: what "closed" looks like."""
    found: dict[NeuronSet, list[Tensor]] = {one: [] for one in sets}
    for group in batches(pairs, subject):
        run = grid.clean_run(subject, prompt_tokens(subject, group)[0], keep=("neurons",))
        for one, values in found.items():
            values.append(run.neurons[one.layer][:, -1, list(one.neurons)])
    return {one: torch.cat(values) for one, values in found.items()}


def closing_cost(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], closed: Closed
) -> pd.DataFrame:
    """Nats that the model's own answers to treated prompts lose if a set is held closed at every answer token.

    Each pair is given the closed values of one real run, in turn. Columns `lost` (summed over the answer) and `n_tokens`.
    """
    rows: list[tuple[object, ...]] = []
    turn = {pair.pair.id: i for i, pair in enumerate(pair for group in batches(pairs, subject) for pair in group)}
    for group in progress(batches(pairs, subject, mixed=True), desc="perplexity"):
        prompt = prompt_tokens(subject, group)[1]
        camps = [openers[pair.pair.treatment].comply for pair in group]
        answer, mask = outcomes.opened_with(subject, prompt, camps, STEPS)
        turns = torch.tensor([turn[pair.pair.id] for pair in group], device=prompt.device)
        values = {one: runs[turns % len(runs)][:, None] for one, runs in closed.items()}
        lost = _lost(subject, prompt, answer, mask, values).cpu().numpy()
        n_tokens = mask.sum(1).cpu().numpy().astype(float)
        for i, token_pair in enumerate(group):
            pair = token_pair.pair
            keys = (pair.id, pair.topic, pair.treatment, pair.split)
            rows += [(*keys, one.name, lost[i, k], n_tokens[i]) for k, one in enumerate(closed)]
    return pd.DataFrame(rows, columns=["pair_id", "topic", "treatment", "split", "set", "lost", "n_tokens"])


def _lost(
    subject: Subject, prompt: Tensor, tokens: Tensor, mask: Tensor, values: Mapping[NeuronSet, Tensor]
) -> Float[Tensor, "pair set"]:
    start, n_steps = prompt.shape[1] - 1, tokens.shape[1]
    run = grid.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1))
    read = range(start, start + n_steps)
    clean = outcomes.sequence_log_prob(subject, run.resid_post[-1][:, None, list(read)], tokens, mask)
    at = _between(run, start, start + n_steps)
    patches = [Patch("neuron", one.layer, at, one.neurons, value) for one, value in values.items()]
    moved = grid.interchange(subject, run, run, patches, read=tuple(read))
    return clean - outcomes.sequence_log_prob(subject, moved, tokens, mask)
