"""Answers that a model generates while last-layer neurons are clamped, on the schedules of `helpers.timing`, labelled.

Decoding is shared where it is the same: the unclamped answers of both prompts of a pair, and what is read before the
prompt's last token. All arms of a batch are decoded side by side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from helpers import defence_outcomes, defence_prompts, grid_chunks, judge, mediation
from helpers.defence_outcomes import Answers, Judge
from helpers.hub import JUDGE
from helpers.progress import progress
from helpers.study import Study
from helpers.subject import Subject
from helpers.timing import STEPS, Arm, Clamp, Other, Others, clamped, greedy, other_runs, written
from helpers.tokens import Openers, TokenPair

PLAIN: Arm = (Clamp("no clamp", ()), "none")


@torch.no_grad()
def generated(
    study: Study, pairs: Sequence[TokenPair], arms: Sequence[Arm], steps: int = STEPS, seen: Others | None = None
) -> pd.DataFrame:
    """Greedy answers to the treated prompts in each arm (clamp, schedule), labelled: a row a pair and arm.

    Columns: pair_id, topic, treatment, split, clamp, schedule, label, `content`, and whether the answer's tokens `changed`
    against no clamp. The exact judge labels the embedded language; elsewhere the opener does (see
    `defence_outcomes.labels`). `content` is a label that does not rest on the opener, "" where there is none: that of the
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
    embedded = [defence_prompts.is_embedded(pair.pair.treated for pair in one) for one in lists]
    for group in progress(mediation.batches(pairs, subject, mixed=True), desc="answers"):
        made, others = _answers(subject, group, arms, steps)
        if seen is not None:
            seen[tuple(pair.pair.id for pair in group)] = others
        kinds = [(home[id(pair)], pair.pair.treatment) for pair in group]
        for kind in dict.fromkeys(kinds):
            at = np.array([other == kind for other in kinds])
            exact = judge.judge if embedded[kind[0]] else None
            parts[kind[0]] += [_rows(study, group, arm, made, at, exact=exact) for arm in arms]
    return [pd.concat(part, ignore_index=True) if part else pd.DataFrame() for part in parts]


def _answers(
    subject: Subject, group: Sequence[TokenPair], arms: Sequence[Arm], steps: int
) -> tuple[dict[Arm, Answers], dict[Clamp, Other]]:
    """Answers of one batch in every arm, and without a clamp (`PLAIN`); and what the clamps were set to.

    Tokens before the prompt's last one are read once for all arms but "prompt": no other arm acts there.
    """
    control, treated = mediation.prompt_tokens(subject, group)
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
    return mediation.CLEAN_RUN_BYTES // grid_chunks.memory_need(subject, 1, n_pos).clean_run


def _rows(
    study: Study,
    group: Sequence[TokenPair],
    arm: Arm,
    answers: Mapping[Arm, Answers],
    at: Bool[np.ndarray, "pair"],
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
    labels = defence_outcomes.labels(study.subject, texts, own, openers, judge=exact, harmful=harmful)
    reads_content = exact is not None or bool(os.environ.get(JUDGE))
    return table.assign(label=labels, content=labels if reads_content else _judged(study, texts, own), changed=changed)


def _judged(study: Study, texts: Sequence[str], made: Answers) -> list[str]:
    """Labels by the study's own judge, "" for a study without one."""
    if study.judge is None:
        return [""] * len(texts)
    none = Openers((), ())
    return defence_outcomes.labels(study.subject, texts, made, none, judge=study.judge, harmful=[False] * len(texts))
