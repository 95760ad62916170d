"""Make what students see from the sources: `python -m exercises.build`.

Writes the notebooks of this folder (stubs and checks), parts of the instructor guide, and into every notebook of the
companion its exercises, the links to the glossary, and the numbers of its prose (of two documents, too). These are
Markdown, found by tags, links and comments: a second run changes nothing, no code changes, and nothing has to be run again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from companion.base.files import write_text
from companion.base.paths import NOTEBOOKS, ROOT, relative
from companion.run import notebooks
from exercises import guide
from exercises.glossary import linked
from exercises.judging import LEVELS, NUMBERS, Exercise, of_notebook
from exercises.numbers import filled
from exercises.questions import QUESTIONS, Question

FOLDER = ROOT / "exercises"
WITH_NUMBERS = (ROOT / "README.md", ROOT / "docs" / "real_models.md")  # beside the notebooks
NEXT = "**Next →**"
TAG = "exercise"
EMPTY = "    return None  # your answer\n"
SETUP = """import sys

sys.path.insert(0, "..")

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import beta

from exercises import check
"""


def stub(solution: Callable[..., Any]) -> str:
    """A solution's source without its body: decorators, signature, docstring and an empty place for the answer."""
    source = inspect.getsource(solution)
    closing = source.index('"""', source.index('"""') + 3) + 3
    return source[: closing + 1] + EMPTY


def cell(kind: str, text: str, name: str, tags: tuple[str, ...] = ()) -> notebooks.Cell:
    """A notebook cell that was never run."""
    made: notebooks.Cell = {"cell_type": kind, "id": name, "metadata": {"tags": list(tags)} if tags else {}}
    made["source"] = text.strip().splitlines(keepends=True)
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def folded(title: str, text: str) -> str:
    """Text that shows when its title is clicked."""
    return f"<details>\n<summary>{title}</summary>\n\n{text.strip()}\n\n</details>"


def heading(one: Exercise | Question, level: str, mark: str = "##") -> str:
    """Number, title, difficulty and minutes."""
    return f"{mark} Exercise {one.number}: {one.title}\n\n*{level}, about {one.minutes} minutes*"


def students_cells(one: Exercise) -> list[notebooks.Cell]:
    """Task, stub and check of one exercise."""
    text = f"{heading(one, LEVELS[one.level])}\n\n{one.task}\n\n{folded('Hint', one.hint)}"
    ask = f'check("{one.number}", {one.solution.__name__})'
    return [
        cell("markdown", text, f"{one.number}-task"),
        cell("code", stub(one.solution), f"{one.number}-answer"),
        cell("code", ask, f"{one.number}-check"),
    ]


def question_cells(one: Question) -> list[notebooks.Cell]:
    """Task and starting point of an open question."""
    text = f"{heading(one, 'open question')}\n\n{one.task}\n\n{folded('Hint', one.hint)}"
    return [cell("markdown", text, f"{one.number}-task"), cell("code", one.start, f"{one.number}-start")]


def students_notebook(number: str, path: Path) -> notebooks.Notebook:
    """The notebook of this folder that goes with the companion's notebook at `path`."""
    top = (
        f"# Exercises of [{path.stem}](../notebooks/{path.name})\n\nWrite the body of each function, run its cell, then the "
        "check below it. The check tries tiny inputs and says what is probably wrong. Hints and solutions are folded under the "
        "exercise in the notebook itself. This file is made from `exercises/*.py`: work on a copy in the "
        "same folder."
    )
    cells = [cell("markdown", top, f"{number}-top"), cell("code", SETUP, f"{number}-setup")]
    cells += [made for one in of_notebook(number) for made in students_cells(one)]
    cells += question_cells(QUESTIONS[number])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def exercise_cells(number: str, path: Path) -> list[notebooks.Cell]:
    """The Markdown cells of a notebook's exercises: task, where its stub and check are, hint and solution."""
    file = f"Stub and check: [exercises/{path.name}](../exercises/{path.name})."
    cells = []
    for one in of_notebook(number):
        solution = f"```python\n{inspect.getsource(one.solution).strip()}\n```"
        top, folds = heading(one, LEVELS[one.level], "###"), (folded("Hint", one.hint), folded("Solution", solution))
        parts = (top, f"{one.task} {file}", *folds)
        cells.append(cell("markdown", "\n\n".join(parts), f"exercise-{one.number}", (f"{TAG}-{one.number}",)))
    last = QUESTIONS[number]
    asked = "\n\n".join((heading(last, "open question", "###"), f"{last.task} {file}", folded("Hint", last.hint)))
    return [*cells, cell("markdown", asked, f"exercise-{last.number}", (f"{TAG}-{last.number}",))]


def with_exercises(notebook: notebooks.Notebook, number: str, path: Path) -> notebooks.Notebook:
    """The notebook with its exercises, its terms linked, and its numbers as the tables have them.

    An exercise stands where its tag stands; one whose tag is nowhere stands before the line that leads on.
    """
    made = {notebooks.tags(one)[0]: one for one in exercise_cells(number, path)}
    cells, placed = [], set[str]()
    for one in notebook["cells"]:
        tag = next((tag for tag in notebooks.tags(one) if tag.split("-")[0] == TAG), "")
        placed.add(tag)
        cells += [made[tag]] if tag in made else [] if tag else [one]
    end = max(i for i, one in enumerate(cells) if notebooks.source(one).startswith(NEXT))
    cells[end:end] = [one for tag, one in made.items() if tag not in placed]
    for one in (one for one in cells if one["cell_type"] == "markdown"):
        one["source"] = filled(notebooks.source(one)).splitlines(keepends=True)
    return {**notebook, "cells": linked(cells)}


def made() -> dict[Path, str]:
    """Every file that is made here, with its content."""
    files = {guide.GUIDE: guide.filled(guide.GUIDE.read_text(encoding="utf-8"))}
    files |= {path: filled(path.read_text(encoding="utf-8")) for path in WITH_NUMBERS}
    for number in NUMBERS:
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        files[FOLDER / path.name] = notebooks.notebook_text(students_notebook(number, path))
        files[path] = notebooks.notebook_text(with_exercises(notebooks.read_notebook(path), number, path))
    return files


def main() -> None:
    """Write every file that is not what its sources say, and name it."""
    for path, text in made().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            print(f"written: {relative(write_text(text, path))}")


if __name__ == "__main__":
    main()
