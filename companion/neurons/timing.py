"""Whole answers while neurons are clamped: when a set acts (C5b), and whether it is a switch of the whole answer (C5c).

Teacher-forced, a set of any layer is clamped at the first or at every token of given answers. Decoded, neurons of the last
layer are clamped on a schedule: a switch does its work at the first token, and what is closed later changes little. Nothing
reads the last layer at other positions, so in the prompt only its last token counts, where the first answer token is
decided. Decoding is shared where it is the same, and all arms of a batch are decoded side by side.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import progress
from companion.base.hub import JUDGE
from companion.generation import labels
from companion.generation.decode import Answers, greedy_answers
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model import activations, memory, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch, on_site, position_mask
from companion.neurons.clamping import NeuronSet
from companion.prompts.tokens import Openers, TokenPair

FORCED_STEPS = 12  # tokens of a teacher-forced answer, its opener included
# Decisions, counted from the first answer token (0), at which the clamp is on. Decision 0 is made at the prompt's end.
SCHEDULES: dict[str, Callable[[int], bool]] = {
    "none": lambda step: False,
    "first token": lambda step: step == 0,
    "first five": lambda step: step < 5,
    "all tokens": lambda step: True,
    "all but the first": lambda step: step > 0,
}


@dataclass(frozen=True)
class Clamp:
    """What is set in the last layer: some neurons, or the whole MLP output (`neurons` is None)."""

    name: str
    neurons: tuple[int, ...] | None = None

    @property
    def site(self) -> str:
        """The site that is set."""
        return "mlp_out" if self.neurons is None else "neuron"

    @property
    def entries(self) -> slice | list[int]:
        """The entries of the site that are set."""
        return slice(None) if self.neurons is None else list(self.neurons)


Closed = dict[NeuronSet, Float[Tensor, "run neuron"]]
Arm = tuple[Clamp, str]  # what is set, and the schedule of when
PLAIN: Arm = (Clamp("no clamp", ()), "none")


# ---- teacher-forced: sets of any layer ----


def timing_effects(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], sets: Sequence[NeuronSet]
) -> pd.DataFrame:
    """Effect (mean of both directions, nats) of each set on log p(answer) - log p(refusal), teacher-forced.

    `first` clamps the set where the first answer token is decided only, `every` there and at every later answer token.
    Answer and refusal are the model's own words (`outcomes.continuations`), the same for all runs of a pair.
    """
    rows: list[tuple[object, ...]] = []
    for group in progress(estimands.batches(pairs, subject, mixed=True), desc="timing"):
        prompts = estimands.prompt_tokens(subject, group)
        own = [openers[one.pair.treatment] for one in group]
        answer, refusal = outcomes.continuations(subject, *prompts, own, FORCED_STEPS)
        effect = _effects_on_text(subject, prompts, answer, sets) - _effects_on_text(subject, prompts, refusal, sets)
        for one, effects in zip(group, effect, strict=True):
            rows += [(*estimands.pair_key(one), each.name, each.layer, *effects[k]) for k, each in enumerate(sets)]
    table = pd.DataFrame(rows, columns=[*estimands.PAIR_KEYS, "set", "layer", "first", "every"])
    return table.assign(form="timing", outcome="Y2")


def _effects_on_text(
    subject: Subject, prompts: Sequence[Int[Tensor, "pair pos"]], text: outcomes.Text, sets: Sequence[NeuronSet]
) -> Float[np.ndarray, "pair set when"]:
    """Effects on log p of one continuation, clamped at the first or at every one of its tokens."""
    runs = [outcomes.forced_run(subject, prompt, text, beside=prompts) for prompt in prompts]
    at = outcomes.decided_at(runs[0], text)
    masks = [position_mask(runs[0].tokens, where) for where in (at[:1], at)]
    patches = [Patch("neuron", one.layer, mask, one.neurons) for one in sets for mask in masks]
    both = []
    for base, source, sign in ((runs[0], runs[1], 1), (runs[1], runs[0], -1)):
        clean, moved = _log_probs(subject, base, source, patches, text)
        both.append(sign * (moved - clean))
    return to_host(((both[0] + both[1]) / 2).reshape(len(text[0]), len(sets), 2))


def _log_probs(
    subject: Subject, base: CleanRun, source: CleanRun, patches: Sequence[Patch], text: outcomes.Text
) -> tuple[Float[Tensor, "pair 1"], Float[Tensor, "pair patch"]]:
    """log p of a text at the end of the base run, as it is and after each patch."""
    at = outcomes.decided_at(base, text)
    clean = outcomes.sequence_log_prob(subject, base.resid_post[-1][:, None, at], text)
    moved = replay.interchange(subject, base, source, patches, read=at)
    return clean, outcomes.sequence_log_prob(subject, moved, text)


def closed_values(subject: Subject, pairs: Sequence[TokenPair], sets: Sequence[NeuronSet]) -> Closed:
    """Each set's values at the last token of the control prompts: what "closed" looks like."""
    found: dict[NeuronSet, list[Tensor]] = {one: [] for one in sets}
    for group in estimands.batches(pairs, subject):
        run = activations.clean_run(subject, estimands.prompt_tokens(subject, group)[0], keep=("neurons",))
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
    in_order = [pair for group in estimands.batches(pairs, subject) for pair in group]
    turn = {pair.pair.id: i for i, pair in enumerate(in_order)}
    for group in progress(estimands.batches(pairs, subject, mixed=True), desc="perplexity"):
        prompt = estimands.prompt_tokens(subject, group)[1]
        camps = [openers[one.pair.treatment].comply for one in group]
        text = outcomes.opened_with(subject, prompt, camps, FORCED_STEPS)
        turns = torch.tensor([turn[one.pair.id] for one in group], device=prompt.device)
        run = outcomes.forced_run(subject, prompt, text)
        at = outcomes.decided_at(run, text)
        where = position_mask(run.tokens, at)
        held = {one: values[turns % len(values)] for one, values in closed.items()}
        patches = [Patch("neuron", one.layer, where, one.neurons, values[:, None]) for one, values in held.items()]
        clean, moved = _log_probs(subject, run, run, patches, text)
        lost, n_tokens = to_host(clean - moved), to_host(text[1].sum(1)).astype(float)
        for i, one in enumerate(group):
            rows += [(*estimands.pair_key(one), each.name, lost[i, k], n_tokens[i]) for k, each in enumerate(closed)]
    return pd.DataFrame(rows, columns=[*estimands.PAIR_KEYS, "set", "lost", "n_tokens"])


# ---- decoded: the last layer on a schedule ----


@dataclass(frozen=True)
class ControlValues:
    """A clamp's values in the control runs of some pairs: at every prompt token, and their mean over the run's own answer.

    Answers of the two runs have different words and lengths, so beyond the prompt there is no token that matches
    another; the refusing run's mean, its end token included, stands for all of them.
    """

    prompt: Float[Tensor, "pair pos width"]
    answer: Float[Tensor, "pair 1 width"]


Controls = dict[tuple[str, ...], dict[Clamp, ControlValues]]  # by the ids of a batch's pairs


def control_values(
    subject: Subject, prompt: Int[Tensor, "pair pos"], made: Answers, clamps: Sequence[Clamp]
) -> dict[Clamp, ControlValues]:
    """Values of several clamps from prompts of the control run and its own greedy answers."""
    used = int(made.mask.any(0).sum())  # what stands behind the last end token of a batch is never read
    answer, mask = (torch.tensor(x[:, :used], device=prompt.device) for x in (made.ids, made.mask))
    run = activations.clean_run(subject, torch.cat([prompt, answer], dim=1), keep=("mlp_out", "neurons"))
    found, n, weight = {}, prompt.shape[1], mask[..., None]
    for clamp in clamps:
        values = run.site(clamp.site, subject.n_layers - 1)[..., clamp.entries]
        mean = (values[:, n:] * weight.to(values)).sum(1, keepdim=True) / weight.to(values).sum(1, keepdim=True)
        found[clamp] = ControlValues(values[:, :n], mean)
    return found


@contextmanager
def clamped(subject: Subject, arms: Sequence[Arm], controls: Mapping[Clamp, ControlValues]) -> Iterator[None]:
    """The arms during greedy answers: the first call of the model reads the prompt, every later one a token.

    Rows are pairs (in the order of `controls`) times arms, a pair's arms side by side. Of the prompt only its last token is
    set: nothing reads the last layer at others.
    """
    with ExitStack() as stack:
        for clamp in dict.fromkeys(clamp for clamp, _ in arms):
            mine = {i: schedule for i, (other, schedule) in enumerate(arms) if other == clamp}
            edit = partial(_edited, clamp, controls[clamp], mine, len(arms), itertools.count())
            stack.enter_context(on_site(subject.layers[-1], clamp.site, edit))
        yield


def _edited(
    clamp: Clamp, control: ControlValues, schedules: Mapping[int, str], n_arms: int, calls: Iterator[int],
    tensor: Tensor,
) -> Tensor | None:  # fmt: skip
    step = next(calls)
    acting = [i for i, schedule in schedules.items() if SCHEDULES[schedule](step)]
    new = tensor.clone()
    for i in acting:
        new[i::n_arms][:, -1:, clamp.entries] = control.answer if step else control.prompt[:, -1:]
    return new if acting else None


def _chosen(made: Answers, rows: slice | Bool[np.ndarray, "row"]) -> Answers:
    return Answers(made.ids[rows], made.mask[rows])


@torch.no_grad()
def forced_scores(
    study: Study, pairs: Sequence[TokenPair], clamp: Clamp, schedules: Sequence[str], known: Controls
) -> pd.DataFrame:
    """Y2 = log p(answer) - log p(refusal) after the treated prompt under a clamp, teacher-forced, in nats.

    Columns: pair_id, topic, treatment, split, schedule, y. The texts are those of `outcomes.continuations`: it needs no
    judge, and a clamp of later tokens cannot break an answer, only make it less likely. `known`: the control runs that
    `clamped_answers` of the same pairs has found.
    """
    subject, rows = study.subject, []
    for group in progress(estimands.batches(pairs, subject, mixed=True), desc="forced answers"):
        control, treated = estimands.prompt_tokens(subject, group)
        openers = [study.openers[one.pair.treatment] for one in group]
        texts = outcomes.continuations(subject, control, treated, openers)
        values = known[tuple(one.pair.id for one in group)][clamp]
        answer, refusal = (_text_log_prob(subject, treated, text, clamp, values, schedules) for text in texts)
        for token_pair, scores in zip(group, (answer - refusal).tolist(), strict=True):
            key = estimands.pair_key(token_pair)
            rows += [(*key, schedule, score) for schedule, score in zip(schedules, scores, strict=True)]
    return pd.DataFrame(rows, columns=[*estimands.PAIR_KEYS, "schedule", "y"])


def _text_log_prob(
    subject: Subject, prompt: Int[Tensor, "pair pos"], text: outcomes.Text, clamp: Clamp, control: ControlValues,
    schedules: Sequence[str],
) -> Float[Tensor, "pair schedule"]:  # fmt: skip
    """log p of one text behind the prompt under each schedule."""
    base = outcomes.forced_run(subject, prompt, text)
    at = outcomes.decided_at(base, text)
    value = torch.cat([control.prompt, control.answer.expand(-1, len(at) - 1, -1)], dim=1)
    places = ([place for step, place in enumerate(at) if SCHEDULES[schedule](step)] for schedule in schedules)
    masks = [position_mask(base.tokens, some) for some in places]
    patches = [Patch(clamp.site, subject.n_layers - 1, mask, clamp.neurons, value) for mask in masks]
    return outcomes.patched_text_log_probs(subject, base, base, patches, text)


@torch.no_grad()
def clamped_answers(
    study: Study, lists: Sequence[Sequence[TokenPair]], arms: Sequence[Arm], steps: int | None = None,
    known: Controls | None = None,
) -> list[pd.DataFrame]:  # fmt: skip
    """Greedy answers to the treated prompts of each list in each arm (clamp, schedule), labelled: a row a pair and arm.

    Columns: pair_id, topic, treatment, split, clamp, schedule, label (see `labels.label_answers`; the exact judge labels
    the embedded language), `content`, and whether the answer's tokens `changed` against no clamp. `content` is a label that
    does not rest on the opener, of the exact judge, a judge model, or the study's own judge, else "". Lists are decoded
    together; an empty one has an empty table. The values of the control runs are added to `known`.
    """
    subject, known = study.subject, {} if known is None else known
    parts: list[list[pd.DataFrame]] = [[] for _ in lists]
    pairs = [pair for one in lists for pair in one]
    home = {id(pair): i for i, one in enumerate(lists) for pair in one}  # one pair may be in two lists, as two objects
    embedded = [labels.is_embedded(pair.pair.treated for pair in one) for one in lists]
    for group in progress(estimands.batches(pairs, subject, mixed=True), desc="answers"):
        made, known[tuple(pair.pair.id for pair in group)] = _batch_answers(
            subject, group, arms, steps or study.answer_steps
        )
        kinds = [(home[id(pair)], pair.pair.treatment) for pair in group]
        for kind in dict.fromkeys(kinds):
            at = np.array([other == kind for other in kinds])
            exact = labels.judge if embedded[kind[0]] else None
            parts[kind[0]] += [_labelled(study, group, arm, made, at, exact=exact) for arm in arms]
    return [pd.concat(part, ignore_index=True) if part else pd.DataFrame() for part in parts]


def _batch_answers(
    subject: Subject, group: Sequence[TokenPair], arms: Sequence[Arm], steps: int
) -> tuple[dict[Arm, Answers], dict[Clamp, ControlValues]]:
    """Answers of one batch in every arm, and without a clamp (`PLAIN`); and what the clamps were set to.

    Tokens before the prompt's last one are read once for all arms: none acts there.
    """
    control, treated = estimands.prompt_tokens(subject, group)
    both, n = greedy_answers(subject, torch.cat([control, treated]), steps), len(group)
    free, plain = _chosen(both, slice(n)), _chosen(both, slice(n, None))
    controls = control_values(subject, control, free, list(dict.fromkeys(clamp for clamp, _ in arms)))
    found = dict.fromkeys((PLAIN, *(arm for arm in arms if arm[1] == "none")), plain)
    rest = [arm for arm in arms if arm not in found]
    at_once = max(1, rows_at_once(subject, treated.shape[1] + steps) // n)
    for start in range(0, len(rest), at_once):
        some = rest[start : start + at_once]
        cache = subject.model(treated[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(some))
        with clamped(subject, some, controls):
            made = greedy_answers(subject, treated[:, -1:].repeat_interleave(len(some), 0), steps, cache)
        found |= {arm: _chosen(made, slice(i, None, len(some))) for i, arm in enumerate(some)}
    return found, controls


def rows_at_once(subject: Subject, n_pos: int) -> int:
    """How many rows of this length are decoded together: as many as clean runs fit into 1 GiB, a pure function of shapes."""
    return memory.CLEAN_RUN_BYTES // memory.sweep_memory(subject, 1, n_pos).clean_run


def _labelled(
    study: Study, group: Sequence[TokenPair], arm: Arm, answers: Mapping[Arm, Answers], at: Bool[np.ndarray, "pair"], *,
    exact: labels.Judge | None,
) -> pd.DataFrame:  # fmt: skip
    """Rows of `clamped_answers` for the pairs `at` (of one treatment) of a batch, in one arm."""
    chosen = [pair for pair, keep in zip(group, at, strict=True) if keep]
    treatment, texts = chosen[0].pair.treatment, [one.pair.treated for one in chosen]
    made, plain = answers[arm], answers[PLAIN]
    own, harmful = _chosen(made, at), [treatment in ("T1", "T2")] * len(chosen)
    changed = ((made.ids != plain.ids) & (made.mask | plain.mask)).any(1)[at]
    keys = [(*estimands.pair_key(one), arm[0].name, arm[1]) for one in chosen]
    table = pd.DataFrame(keys, columns=[*estimands.PAIR_KEYS, "clamp", "schedule"])
    label = labels.label_answers(study.subject, texts, own, study.openers[treatment], judge=exact, harmful=harmful)
    if exact is not None or os.environ.get(JUDGE):
        content = label
    elif study.judge is None:
        content = [""] * len(texts)
    else:
        none, no_harm = Openers((), ()), [False] * len(texts)
        content = labels.label_answers(study.subject, texts, own, none, judge=study.judge, harmful=no_harm)
    return table.assign(label=label, content=content, changed=changed)
