"""When an intervention on the last layer acts: at the prompt, at the first answer token, at the first five, or at all (C5c).

A switch of the whole answer does its work at the first token: what is closed later changes little. Nothing reads the last
layer at other positions, so in the prompt only its last token counts, and there the first answer token is decided.

Answers that a model generates while last-layer neurons are clamped, on the schedules of `companion.neurons.timing`, labelled.

Decoding is shared where it is the same: the unclamped answers of both prompts of a pair, and what is read before the
prompt's last token. All arms of a batch are decoded side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from companion.base.display import progress
from companion.base.hub import JUDGE
from companion.generation import labels
from companion.generation.decode import Answers
from companion.generation.labels import Judge, label_answers
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model import activations, load, memory, replay
from companion.model.activations import on_input, on_output
from companion.model.architecture import Subject
from companion.model.interventions import Patch, projection
from companion.prompts.tokens import Openers, TokenPair

STEPS = outcomes.STEPS


# Decisions, counted from the first answer token (0), at which the clamp is on. Decision 0 is made at the prompt's end.
SCHEDULES: dict[str, Callable[[int], bool]] = {
    "none": lambda step: False,
    "prompt": lambda step: step == 0,
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
    def kept(self) -> str:
        """What a clean run must keep for it."""
        return "mlp_out" if self.neurons is None else "neurons"


Arm = tuple[Clamp, str]  # what is set, and the schedule of when


@dataclass(frozen=True)
class Other:
    """The other run's values of a clamp, for some pairs: at every prompt token, and its mean over its own answer."""

    prompt: Float[Tensor, "pair pos width"]
    answer: Float[Tensor, "pair 1 width"]


# By the ids of a batch's pairs.
Others = dict[tuple[str, ...], dict[Clamp, Other]]


@torch.no_grad()
def other_run(subject: Subject, pairs: Sequence[TokenPair], clamp: Clamp, steps: int = STEPS) -> Other:
    """Values of the control run: of each prompt token, and averaged over the tokens of its own greedy answer.

    Answers of the two runs have different words and lengths, so beyond the prompt there is no token that matches
    another; the refusing run's mean, its end token included, stands for all of them.
    """
    prompt, _ = estimands.prompt_tokens(subject, pairs)
    return other_runs(subject, prompt, greedy(subject, prompt, steps), [clamp])[clamp]


def other_runs(
    subject: Subject, prompt: Int[Tensor, "pair pos"], answer: Int[Tensor, "pair step"], clamps: Sequence[Clamp]
) -> dict[Clamp, Other]:
    """The same for several clamps, from prompts of the control run and its own answers."""
    mask = torch.tensor(written(subject, answer).mask, device=prompt.device)
    used = int(mask.any(0).sum())  # what stands behind the last end token of a batch is never read
    tokens, mask = torch.cat([prompt, answer[:, :used]], dim=1), mask[:, :used]
    run = activations.clean_run(subject, tokens, keep=("resid", *{clamp.kept for clamp in clamps}))
    found, n, weight = {}, prompt.shape[1], mask[..., None]
    for clamp in clamps:
        values = run.site(clamp.site, subject.n_layers - 1)[..., _index(clamp)]
        mean = (values[:, n:] * weight.to(values)).sum(1, keepdim=True) / weight.to(values).sum(1, keepdim=True)
        found[clamp] = Other(values[:, :n], mean)
    return found


def _index(clamp: Clamp) -> slice | list[int]:
    return slice(None) if clamp.neurons is None else list(clamp.neurons)


@contextmanager
def clamped(subject: Subject, arms: Sequence[Arm], others: Mapping[Clamp, Other]) -> Iterator[None]:
    """The arms during greedy answers: the first call of the model reads the prompt, every later one a token.

    Rows are pairs (in the order of `others`) times arms, a pair's arms side by side. "prompt" sets every prompt token of
    the first call, all others its last one only.
    """
    parts = subject.layers[-1]
    with ExitStack() as stack:
        for clamp in dict.fromkeys(clamp for clamp, _ in arms):
            mine = [(i, schedule) for i, (other, schedule) in enumerate(arms) if other == clamp]
            edit = _Edit(clamp, others[clamp], mine, len(arms))
            whole = clamp.neurons is None
            at = on_output(parts.mlp_write, edit) if whole else on_input(projection(parts, "neuron"), edit)
            stack.enter_context(at)
        yield


@dataclass
class _Edit:
    """Sets one clamp's values, and counts the calls."""

    clamp: Clamp
    other: Other
    schedules: Sequence[tuple[int, str]]
    n_arms: int
    calls: int = 0

    def __call__(self, tensor: Tensor) -> Tensor | None:
        step, self.calls = self.calls, self.calls + 1
        acting = [(i, schedule) for i, schedule in self.schedules if SCHEDULES[schedule](step)]
        new = tensor.clone()
        for i, schedule in acting:
            cells = new[i :: self.n_arms]
            if step:
                cells[:, -1:, _index(self.clamp)] = self.other.answer
            elif schedule == "prompt":
                cells[..., _index(self.clamp)] = self.other.prompt
            else:
                cells[:, -1:, _index(self.clamp)] = self.other.prompt[:, -1:]
        return new if acting else None


@torch.no_grad()
def greedy(
    subject: Subject, tokens: Int[Tensor, "row pos"], steps: int, cache: DynamicCache | None = None
) -> Int[Tensor, "row step"]:
    """Greedy continuations, read on from a cache if one is given; filled with the end token once every row has ended."""
    ends = torch.tensor(load.end_tokens(subject), device=tokens.device)
    out = subject.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    text = out.logits[:, -1:].argmax(-1)
    while text.shape[1] < steps and not bool(torch.isin(text, ends).any(-1).all()):
        out = subject.model(text[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
    return torch.nn.functional.pad(text, (0, steps - text.shape[1]), value=int(ends[0]) if len(ends) else 0)


def written(subject: Subject, ids: Int[Tensor, "row step"]) -> Answers:
    """The answers up to their end tokens, which belong to them."""
    is_end = np.isin(ids.cpu().numpy(), load.end_tokens(subject))
    return Answers(ids.cpu().numpy(), is_end.cumsum(-1) - is_end == 0)


@torch.no_grad()
def forced(
    study: Study, pairs: Sequence[TokenPair], clamp: Clamp, schedules: Sequence[str], seen: Others | None = None
) -> pd.DataFrame:
    """Y2 = log p(answer) - log p(refusal) after the treated prompt under a clamp, teacher-forced, in nats.

    Columns: pair_id, topic, treatment, split, schedule, y. Answer and refusal are the model's own, as in
    `outcomes.continuations`. It needs no judge, so it is there for every model; the texts are fixed, so a clamp of later
    tokens cannot break an answer, only make it less likely. `seen`: other runs that are known (`timing.generated`).
    """
    subject, rows = study.subject, []
    for group in progress(estimands.batches(pairs, subject), desc="forced answers"):
        control, treated = estimands.prompt_tokens(subject, group)
        texts = outcomes.continuations(subject, control, treated, study.openers[group[0].pair.treatment], STEPS)
        known = (seen or {}).get(tuple(pair.pair.id for pair in group), {})
        other = known.get(clamp) or other_run(subject, group, clamp)
        answer = _text_log_prob(subject, treated, (texts.answer, texts.answer_mask), clamp, other, schedules)
        refusal = _text_log_prob(subject, treated, (texts.refusal, texts.refusal_mask), clamp, other, schedules)
        for token_pair, scores in zip(group, (answer - refusal).tolist(), strict=True):
            pair = token_pair.pair
            key = (pair.id, pair.topic, pair.treatment, pair.split)
            rows += [(*key, schedule, score) for schedule, score in zip(schedules, scores, strict=True)]
    return pd.DataFrame(rows, columns=["pair_id", "topic", "treatment", "split", "schedule", "y"])


def _text_log_prob(
    subject: Subject,
    prompt: Int[Tensor, "pair pos"],
    text: tuple[Int[Tensor, "pair step"], Bool[Tensor, "pair step"]],
    clamp: Clamp,
    other: Other,
    schedules: Sequence[str],
) -> Float[Tensor, "pair schedule"]:
    """log p of one text behind the prompt under each schedule."""
    tokens, mask = text
    base = activations.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1))
    first = prompt.shape[1] - 1
    value = torch.cat([other.prompt, other.answer.expand(-1, base.tokens.shape[1] - first - 1, -1)], dim=1)
    patches = []
    for schedule in schedules:
        where = torch.zeros_like(base.tokens, dtype=torch.bool)
        where[:, [first + step for step in range(tokens.shape[1]) if SCHEDULES[schedule](step)]] = True
        patches.append(Patch(clamp.site, subject.n_layers - 1, where, clamp.neurons, value))
    read = range(first, first + tokens.shape[1])
    resid = replay.interchange(subject, base, base, patches, read=tuple(read))
    # One schedule at a time: the full vocabulary at every step is large.
    scores = [outcomes.sequence_log_prob(subject, resid[:, i], tokens, mask) for i in range(len(patches))]
    return torch.stack(scores, dim=1)


PLAIN: Arm = (Clamp("no clamp", ()), "none")


@torch.no_grad()
def generated(
    study: Study, pairs: Sequence[TokenPair], arms: Sequence[Arm], steps: int = STEPS, seen: Others | None = None
) -> pd.DataFrame:
    """Greedy answers to the treated prompts in each arm (clamp, schedule), labelled: a row a pair and arm.

    Columns: pair_id, topic, treatment, split, clamp, schedule, label, `content`, and whether the answer's tokens `changed`
    against no clamp. The exact judge labels the embedded language; elsewhere the opener does (see
    `labels.label_answers`). `content` is a label that does not rest on the opener, "" where there is none: that of the
    exact judge, of a judge model, or of the study's own judge.
    """
    return generated_each(study, [pairs], arms, steps, seen)[0]


@torch.no_grad()
def generated_each(
    study: Study,
    lists: Sequence[Sequence[TokenPair]],
    arms: Sequence[Arm],
    steps: int = STEPS,
    seen: Others | None = None,
) -> list[pd.DataFrame]:
    """`generated` of several lists of pairs, decoded together; an empty table for an empty list."""
    subject = study.subject
    parts: list[list[pd.DataFrame]] = [[] for _ in lists]
    pairs = [pair for one in lists for pair in one]
    home = {id(pair): i for i, one in enumerate(lists) for pair in one}  # one pair may be in two lists, as two objects
    embedded = [labels.is_embedded(pair.pair.treated for pair in one) for one in lists]
    for group in progress(estimands.batches(pairs, subject, mixed=True), desc="answers"):
        made, others = _answers(subject, group, arms, steps)
        if seen is not None:
            seen[tuple(pair.pair.id for pair in group)] = others
        kinds = [(home[id(pair)], pair.pair.treatment) for pair in group]
        for kind in dict.fromkeys(kinds):
            at = np.array([other == kind for other in kinds])
            exact = labels.judge if embedded[kind[0]] else None
            parts[kind[0]] += [_rows(study, group, arm, made, at, exact=exact) for arm in arms]
    return [pd.concat(part, ignore_index=True) if part else pd.DataFrame() for part in parts]


def _answers(
    subject: Subject, group: Sequence[TokenPair], arms: Sequence[Arm], steps: int
) -> tuple[dict[Arm, Answers], dict[Clamp, Other]]:
    """Answers of one batch in every arm, and without a clamp (`PLAIN`); and what the clamps were set to.

    Tokens before the prompt's last one are read once for all arms but "prompt": no other arm acts there.
    """
    control, treated = estimands.prompt_tokens(subject, group)
    free, plain = greedy(subject, torch.cat([control, treated]), steps).chunk(2)
    others = other_runs(subject, control, free, list(dict.fromkeys(clamp for clamp, _ in arms)))
    found = {arm: written(subject, plain) for arm in (PLAIN, *(arm for arm in arms if arm[1] == "none"))}
    whole = [arm for arm in arms if arm[1] == "prompt"]
    for arm in whole:
        with clamped(subject, [arm], others):
            found[arm] = written(subject, greedy(subject, treated, steps))
    rest = [arm for arm in arms if arm not in found]
    at_once = max(1, rows_at_once(subject, treated.shape[1] + steps) // len(group))
    for start in range(0, len(rest), at_once):
        some = rest[start : start + at_once]
        cache = subject.model(treated[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(some))
        with clamped(subject, some, others):
            ids = greedy(subject, treated[:, -1:].repeat_interleave(len(some), 0), steps, cache)
        found |= {arm: written(subject, ids[i :: len(some)]) for i, arm in enumerate(some)}
    return found, others


def rows_at_once(subject: Subject, n_pos: int) -> int:
    """How many rows of this length are decoded together: as many as clean runs fit into 1 GiB, a pure function of shapes."""
    return memory.CLEAN_RUN_BYTES // memory.sweep_memory(subject, 1, n_pos).clean_run


def _rows(
    study: Study,
    group: Sequence[TokenPair],
    arm: Arm,
    answers: Mapping[Arm, Answers],
    at: Bool[np.ndarray, pair],
    *,
    exact: Judge | None,
) -> pd.DataFrame:
    """Rows of `generated` for the pairs `at` (of one treatment) of a batch, in one arm."""
    chosen = [pair.pair for pair, keep in zip(group, at, strict=True) if keep]
    treatment = chosen[0].treatment
    texts, harmful = [pair.treated for pair in chosen], [treatment in ("T1", "T2")] * len(chosen)
    made, plain = answers[arm], answers[PLAIN]
    own, openers = Answers(made.ids[at], made.mask[at]), study.openers[treatment]
    changed = ((made.ids != plain.ids) & (made.mask | plain.mask)).any(1)[at]
    keys = [(pair.id, pair.topic, treatment, pair.split, arm[0].name, arm[1]) for pair in chosen]
    table = pd.DataFrame(keys, columns=["pair_id", "topic", "treatment", "split", "clamp", "schedule"])
    labels = label_answers(study.subject, texts, own, openers, judge=exact, harmful=harmful)
    reads_content = exact is not None or bool(os.environ.get(JUDGE))
    return table.assign(label=labels, content=labels if reads_content else _judged(study, texts, own), changed=changed)


def _judged(study: Study, texts: Sequence[str], made: Answers) -> list[str]:
    """Labels by the study's own judge, "" for a study without one."""
    if study.judge is None:
        return [""] * len(texts)
    none = Openers((), ())
    return labels.label_answers(study.subject, texts, made, none, judge=study.judge, harmful=[False] * len(texts))
