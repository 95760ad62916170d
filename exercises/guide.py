"""The parts of the instructor guide that follow from the exercises: minutes and the key."""

from __future__ import annotations

import re

from companion.base.paths import ROOT
from exercises import mystery
from exercises.judging import LEVELS, NUMBERS, of_notebook
from exercises.questions import QUESTIONS

GUIDE = ROOT / "docs" / "teaching.md"


def minutes() -> str:
    """A line for each notebook: its exercises with their minutes."""
    lines = ["| notebook | exercises (minutes) | open question | together |", "| --- | --- | --- | --- |"]
    for number in NUMBERS:
        own, last = of_notebook(number), QUESTIONS[number]
        each = ", ".join(f"{one.title} ({one.minutes}, {LEVELS[one.level]})" for one in own)
        total = sum(one.minutes for one in own) + last.minutes
        lines.append(f"| {number} | {each} | {last.title} ({last.minutes}) | {total} |")
    return "\n".join(lines)


def key(code: int = 1) -> str:
    """The answers to the open questions."""
    lines = ["| notebook | A | B | C |", "| --- | --- | --- | --- |"]
    lines += [f"| {number} | {' | '.join(found.values())} |" for number, found in mystery.keys(code).items()]
    return "\n".join(lines)


PARTS = {"minutes": minutes, "key": key}


def filled(text: str) -> str:
    """The guide with its made parts written anew, each between two comments that name it."""
    for name, part in PARTS.items():
        ends = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
        between = re.compile(f"{re.escape(ends[0])}.*?{re.escape(ends[1])}", re.S)
        if len(between.findall(text)) != 1:
            raise ValueError(f"docs/teaching.md must have one part between {ends[0]} and {ends[1]}")
        made = f"{ends[0]}\n\n{part()}\n\n{ends[1]}"
        text = between.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text
