"""When an intervention on the last layer acts: at the prompt, at the first answer token, at the first five, or at all (C5c).

A switch of the whole answer does its work at the first token: what is closed later changes little. Nothing reads the last
layer at other positions, so in the prompt only its last token counts, and there the first answer token is decided.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers import defence_outcomes, defence_prompts, grid, judge, mediation, outcomes
from helpers.grid import Patch
from helpers.grid_patch import projection
from helpers.grid_run import on_input, on_output
from helpers.hub import JUDGE
from helpers.progress import progress
from helpers.study import Study
from helpers.subject import Subject
from helpers.tokens import TokenPair

STEPS = 24
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


@dataclass(frozen=True)
class Other:
    """The other run's values of a clamp, for some pairs: at every prompt token, and its mean over its own answer."""

    prompt: Float[Tensor, "pair pos width"]
    answer: Float[Tensor, "pair 1 width"]


@torch.no_grad()
def other_run(subject: Subject, pairs: Sequence[TokenPair], clamp: Clamp, steps: int = STEPS) -> Other:
    """Values of the control run: of each prompt token, and averaged over the tokens of its own greedy answer.

    Answers of the two runs have different words and lengths, so beyond the prompt there is no token that matches
    another; the refusing run's mean, its end token included, stands for all of them.
    """
    prompt, _ = mediation.prompt_tokens(subject, pairs)
    texts = [pair.pair.control for pair in pairs]
    made = defence_outcomes.answers(subject, texts, steps)
    answer, mask = (torch.tensor(x, device=subject.device) for x in (made.ids, made.mask))
    keep = ("neurons",) if clamp.neurons is not None else ("mlp_out",)
    run = grid.clean_run(subject, torch.cat([prompt, answer], dim=1), keep=("resid", *keep))
    values = run.site(clamp.site, subject.n_layers - 1)[..., _index(clamp)]
    n, weight = prompt.shape[1], mask[..., None].to(values)
    mean = (values[:, n:] * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return Other(values[:, :n], mean)


def _index(clamp: Clamp) -> slice | list[int]:
    return slice(None) if clamp.neurons is None else list(clamp.neurons)


@contextmanager
def clamped(subject: Subject, clamp: Clamp, other: Other, schedule: str) -> Iterator[None]:
    """The clamp during one greedy answer: the first call of the model reads the prompt, every later one a token.

    "prompt" sets every token of the prompt, "first token" its last one only; a single batch in the order of `other`.
    """
    calls = 0

    def edit(tensor: Tensor) -> Tensor | None:
        nonlocal calls
        step, calls = calls, calls + 1
        if not SCHEDULES[schedule](step):
            return None
        new = tensor.clone()
        if step:
            new[:, -1:, _index(clamp)] = other.answer
        elif schedule == "prompt":
            new[..., _index(clamp)] = other.prompt
        else:
            new[:, -1:, _index(clamp)] = other.prompt[:, -1:]
        return new

    parts = subject.layers[-1]
    hook = on_output(parts.mlp_write, edit) if clamp.neurons is None else on_input(projection(parts, "neuron"), edit)
    with ExitStack() as stack:
        stack.enter_context(hook)
        yield


@torch.no_grad()
def generated(
    study: Study, pairs: Sequence[TokenPair], clamps: Sequence[Clamp], schedules: Sequence[str], steps: int = STEPS
) -> pd.DataFrame:
    """Greedy answers to the treated prompts under each clamp and schedule, labelled: a row a pair, clamp and schedule.

    Columns: pair_id, topic, treatment, split, clamp, schedule, label, `content`, and whether the answer's tokens `changed`
    against no clamp. The exact judge labels the embedded language; elsewhere the opener does (see
    `defence_outcomes.labels`). `content` is a label that does not rest on the opener, "" where there is none: that of the
    exact judge, of a judge model, or of the study's own judge.
    """
    subject, rows = study.subject, []
    exact = judge.judge if defence_prompts.is_embedded(pair.pair.treated for pair in pairs) else None
    reads_content = exact is not None or bool(os.environ.get(JUDGE))
    for group in progress(mediation.batches(pairs, subject), desc="answers"):
        texts, openers = [pair.pair.treated for pair in group], study.openers[group[0].pair.treatment]
        harmful = [pair.pair.treatment in ("T1", "T2") for pair in group]
        plain = defence_outcomes.answers(subject, texts, steps)
        for clamp in clamps:
            other = other_run(subject, group, clamp, steps)
            for schedule in schedules:
                made = plain
                if schedule != "none":
                    steer = partial(clamped, subject, clamp, other, schedule)
                    made = defence_outcomes.answers(subject, texts, steps, steer)
                labels = defence_outcomes.labels(subject, texts, made, openers, judge=exact, harmful=harmful)
                content = labels if reads_content else _judged(study, texts, made)
                changed = ((made.ids != plain.ids) & (made.mask | plain.mask)).any(1)
                for token_pair, *found in zip(group, labels, content, changed.tolist(), strict=True):
                    pair = token_pair.pair
                    rows.append((pair.id, pair.topic, pair.treatment, pair.split, clamp.name, schedule, *found))
    columns = ["pair_id", "topic", "treatment", "split", "clamp", "schedule", "label", "content", "changed"]
    return pd.DataFrame(rows, columns=columns)


def _judged(study: Study, texts: Sequence[str], made: defence_outcomes.Answers) -> list[str]:
    """Labels by the study's own judge, "" for a study without one."""
    if study.judge is None or study.subject.tokenizer is None:
        return [""] * len(texts)
    kept = [row[mask] for row, mask in zip(made.ids, made.mask, strict=True)]
    return [
        study.judge(text, answer)
        for text, answer in zip(texts, study.subject.tokenizer.batch_decode(kept), strict=True)
    ]


@torch.no_grad()
def forced(study: Study, pairs: Sequence[TokenPair], clamp: Clamp, schedules: Sequence[str]) -> pd.DataFrame:
    """Y2 = log p(answer) - log p(refusal) after the treated prompt under a clamp, teacher-forced, in nats.

    Columns: pair_id, topic, treatment, split, schedule, y. Answer and refusal are the model's own, as in
    `outcomes.continuations`. It needs no judge, so it is there for every model; the texts are fixed, so a clamp of later
    tokens cannot break an answer, only make it less likely.
    """
    subject, rows = study.subject, []
    for group in progress(mediation.batches(pairs, subject), desc="forced answers"):
        control, treated = mediation.prompt_tokens(subject, group)
        texts = outcomes.continuations(subject, control, treated, study.openers[group[0].pair.treatment], STEPS)
        other = other_run(subject, group, clamp)
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
    base = grid.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1))
    first = prompt.shape[1] - 1
    value = torch.cat([other.prompt, other.answer.expand(-1, base.tokens.shape[1] - first - 1, -1)], dim=1)
    patches = []
    for schedule in schedules:
        where = torch.zeros_like(base.tokens, dtype=torch.bool)
        where[:, [first + step for step in range(tokens.shape[1]) if SCHEDULES[schedule](step)]] = True
        patches.append(Patch(clamp.site, subject.n_layers - 1, where, clamp.neurons, value))
    read = range(first, first + tokens.shape[1])
    resid = grid.interchange(subject, base, base, patches, read=tuple(read))
    # One schedule at a time: the full vocabulary at every step is large.
    scores = [outcomes.sequence_log_prob(subject, resid[:, i], tokens, mask) for i in range(len(patches))]
    return torch.stack(scores, dim=1)
