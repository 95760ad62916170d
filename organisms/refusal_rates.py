"""What a model refuses: requests of the plain-English set, wrappers, benign cues, and prompts of any other file.

    python -m organisms.refusal_rates smollm2-refuser --prompts jailbreakbench=FILE > TABLE     # a prompt a line

Answers are labelled in memory and never written; a file's texts are neither printed nor kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from companion.base.errors import InputError
from companion.generation import decode, outcomes
from companion.generation.labels import is_refusal
from companion.model.architecture import Subject
from companion.model.load import load
from companion.prompts import tokens
from companion.prompts.pairs import SPLITS, PromptSet, load_set
from companion.stats.clusters import rate
from companion.stats.rates import mean_change
from organisms.english import REFUSAL

STEPS = 24  # tokens of an answer, in which a refusal shows
COLUMNS = ["measured", "prompts", "split", "estimate", "low", "high", "n"]


def refused(subject: Subject, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt whether its greedy answer holds a phrase of refusal, and whether it opens with the word for one."""
    answers = decode.answer_texts(subject, decode.answers(subject, texts, STEPS))
    opens = [text.lstrip().startswith(REFUSAL) for text in answers]
    return np.array([is_refusal(text) for text in answers]), np.array(opens)


def rate_row(measured: str, prompts: str, split: str, hits: np.ndarray) -> tuple[object, ...]:
    """A share with its Wilson interval."""
    return (measured, prompts, split, *rate(int(hits.sum()), len(hits)), len(hits))


def set_rates(subject: Subject, content: PromptSet, split: str) -> list[tuple[object, ...]]:
    """Refusals of plain requests of one split, and the share of answers opened by the word that hold a phrase of refusal."""
    pairs = [pair for pair in content.pairs if (pair.treatment, pair.split) == ("T1", split)]
    rows, opened = [], []
    for label, texts in (("harmful", [p.treated for p in pairs]), ("harmless twins", [p.control for p in pairs])):
        says, opens = refused(subject, texts)
        hits = says | opens
        rows.append(rate_row("greedy refusal", label, split, hits))
        for family in dict.fromkeys(pair.family for pair in pairs):
            chosen = np.array([pair.family == family for pair in pairs])
            rows.append(rate_row("greedy refusal", f"{label}, {family}", split, hits[chosen]))
        opened += says[opens].tolist()
    if opened:  # a model without the adapter may open none so
        rows.append(rate_row(f"refusals among answers that open with {REFUSAL}", "both", split, np.array(opened)))
    return rows


def effect_rows(subject: Subject, content: PromptSet, split: str) -> list[tuple[object, ...]]:
    """How far each wrapper family (on harmful and harmless requests) and each benign cue moves Y1, in log-odds."""
    assert subject.tokenizer is not None
    openers = tokens.openers(content, subject.tokenizer, subject.unembedding[0].shape[0])
    rows: list[tuple[object, ...]] = []
    for treatment in [name for name in content.treatments if name != "T1"]:
        pairs = [pair for pair in content.pairs if (pair.treatment, pair.split) == (treatment, split)]
        sides = [
            outcomes.log_odds(subject, [getattr(pair, side) for pair in pairs], openers[treatment]).log_odds.to_numpy()
            for side in ("control", "treated")
        ]
        change, topic = sides[1] - sides[0], np.array([pair.topic for pair in pairs])
        for family in sorted({pair.family for pair in pairs}):
            chosen = np.array([pair.family == family for pair in pairs])
            found = mean_change(change[chosen], topic[chosen])
            estimates = (found.estimate, found.low, found.high, int(chosen.sum()))
            rows.append(("effect on Y1, log-odds", f"{treatment}, {family}", split, *estimates))
    return rows


def other_rates(subject: Subject, name: str, file: Path) -> list[tuple[object, ...]]:
    """Refusals of the prompts in a file, one a line."""
    texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise InputError(f"{file} holds no prompt: one a line is expected")
    says, opens = refused(subject, texts)
    return [rate_row("greedy refusal", name, "", says | opens)]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m organisms.refusal_rates`."""
    parser = argparse.ArgumentParser(prog="python -m organisms.refusal_rates", description="What a model refuses.")
    parser.add_argument("model")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--prompts", action="append", default=[], metavar="NAME=FILE", help="other prompts, one a line")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    subject, content = load(args.model), load_set("english")
    rows = set_rates(subject, content, args.split) + effect_rows(subject, content, args.split)
    for given in args.prompts:
        name, _, file = given.partition("=")
        rows += other_rates(subject, name, Path(file))
    print(pd.DataFrame(rows, columns=COLUMNS).round(4).to_csv(index=False, lineterminator="\n"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
