"""Gate or contributor: whole answers, teacher-forced, with a set clamped: when it acts, and what closing it costs elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.display import progress
from companion.mediation import outcomes
from companion.mediation.estimands import batches, prompt_tokens
from companion.model import activations, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.neurons.clamping import NeuronSet
from companion.prompts.tokens import Openers, TokenPair

STEPS = 12  # tokens of an answer, its opener included
Text = tuple[Tensor, Tensor]  # tokens (pair, step) behind a prompt and their mask
Closed = dict[NeuronSet, Float[Tensor, "run neuron"]]


def timing_effects(
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
        effect = _effects_on_text(subject, prompts, (texts.answer, texts.answer_mask), sets)
        effect -= _effects_on_text(subject, prompts, (texts.refusal, texts.refusal_mask), sets)
        for one, effects in zip(group, effect, strict=True):
            rows += [(*_keys(one), each.name, each.layer, *effects[k]) for k, each in enumerate(sets)]
    names = ["pair_id", "topic", "treatment", "split", "set", "layer", "first", "every"]
    return pd.DataFrame(rows, columns=names).assign(form="timing", outcome="Y2")


def _keys(one: TokenPair) -> tuple[str, str, str, str]:
    return one.pair.id, one.pair.topic, one.pair.treatment, one.pair.split


def _effects_on_text(
    subject: Subject, prompts: Sequence[Int[Tensor, "pair pos"]], text: Text, sets: Sequence[NeuronSet]
) -> Float[np.ndarray, "pair set when"]:
    """Effects on log p of one continuation, clamped at the first or at every one of its tokens."""
    start, n_steps = prompts[0].shape[1] - 1, text[0].shape[1]
    runs = [outcomes.forced_run(subject, prompt, text[0]) for prompt in prompts]
    patches = [_patch(one, runs[0], range(start, end)) for one in sets for end in (start + 1, start + n_steps)]
    both = []
    for base, source, sign in ((runs[0], runs[1], 1), (runs[1], runs[0], -1)):
        clean, moved = _log_probs(subject, base, source, patches, text)
        both.append(sign * (moved - clean))
    return ((both[0] + both[1]) / 2).reshape(len(text[0]), len(sets), 2).cpu().numpy()


def _patch(one: NeuronSet, run: CleanRun, columns: range, value: Tensor | None = None) -> Patch:
    mask = torch.zeros_like(run.tokens, dtype=torch.bool)
    mask[:, columns.start : columns.stop] = True
    return Patch("neuron", one.layer, mask, one.neurons, value)


def _log_probs(
    subject: Subject, base: CleanRun, source: CleanRun, patches: Sequence[Patch], text: Text
) -> tuple[Float[Tensor, "pair 1"], Float[Tensor, "pair patch"]]:
    """log p of a text at the end of the base run, as it is and after each patch."""
    n_pos, n_steps = base.tokens.shape[1], text[0].shape[1]
    read = range(n_pos - n_steps, n_pos)
    clean = outcomes.sequence_log_prob(subject, base.resid_post[-1][:, None, list(read)], *text)
    moved = replay.interchange(subject, base, source, patches, read=tuple(read))
    return clean, outcomes.sequence_log_prob(subject, moved, *text)


def closed_values(subject: Subject, pairs: Sequence[TokenPair], sets: Sequence[NeuronSet]) -> Closed:
    """Each set's values at the last token of the control prompts: what "closed" looks like."""
    found: dict[NeuronSet, list[Tensor]] = {one: [] for one in sets}
    for group in batches(pairs, subject):
        run = activations.clean_run(subject, prompt_tokens(subject, group)[0], keep=("neurons",))
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
        text = outcomes.opened_with(subject, prompt, [openers[one.pair.treatment].comply for one in group], STEPS)
        turns = torch.tensor([turn[one.pair.id] for one in group], device=prompt.device)
        run, answer = (
            outcomes.forced_run(subject, prompt, text[0]),
            range(prompt.shape[1] - 1, prompt.shape[1] - 1 + text[0].shape[1]),
        )
        patches = [_patch(one, run, answer, values[turns % len(values)][:, None]) for one, values in closed.items()]
        clean, moved = _log_probs(subject, run, run, patches, text)
        lost, n_tokens = (clean - moved).cpu().numpy(), text[1].sum(1).cpu().numpy().astype(float)
        for i, one in enumerate(group):
            rows += [(*_keys(one), each.name, lost[i, k], n_tokens[i]) for k, each in enumerate(closed)]
    return pd.DataFrame(rows, columns=["pair_id", "topic", "treatment", "split", "set", "lost", "n_tokens"])
