"""What an exercise is, and how an answer to it is judged: on tiny inputs, with a message that names the likely mistake."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

NUMBERS = ("00", "01", "02", "03", "04", "05", "06", "07", "08")
LEVELS = {1: "easy", 2: "medium", 3: "hard"}
TOLERANCE = 1e-5
IN_PLACE = (
    "the values are right, but an input was changed in place: work on a copy, or the next use of that run begins with a "
    "patched one"
)


@dataclass(frozen=True)
class Case:
    """One tiny input and the answer to it, worked out by hand and not by the solution."""

    args: tuple[Any, ...]
    gives: Any


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer: what the message says of it, and the function that makes it."""

    says: str
    answer: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise: `number` is the notebook's and its own, `level` 1 to 3, `task` and `hint` are Markdown."""

    number: str
    title: str
    level: int
    minutes: int
    task: str
    hint: str
    solution: Callable[..., Any]
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]


def of_notebook(number: str) -> tuple[Exercise, ...]:
    """The exercises of one notebook."""
    found: tuple[Exercise, ...] = import_module(f"exercises.nb{number}").EXERCISES
    return found


def find(number: str) -> Exercise:
    """The exercise with this number, such as `02-1`; `KeyError` if there is none."""
    book = number.split("-")[0]
    found = {one.number: one for one in of_notebook(book)} if book in NUMBERS else {}
    if number not in found:
        raise KeyError(f"there is no exercise {number!r}; numbers look like '02-1'")
    return found[number]


def check(number: str, answer: Callable[..., Any]) -> None:
    """Print whether the answer is right, or what is probably wrong with it."""
    problem = judge(find(number), answer)
    print(f"{number}: {problem}" if problem else f"{number}: right.")


def judge(exercise: Exercise, answer: Callable[..., Any]) -> str:
    """What is wrong with an answer; empty if it is right on every case."""
    got, spoilt = [], False
    for case in exercise.cases:
        args = tuple(map(_copy, case.args))
        try:
            got.append(answer(*args))
        except Exception as error:
            return f"it stopped with {type(error).__name__}: {error}; the input was {_inputs(exercise, case)}"
        spoilt = spoilt or not _untouched(case.args, args)
    if all(one is None for one in got):
        return "it returned None on every input: is the body still empty, or a `return` missing?"
    if all(same(one, case.gives) for one, case in zip(got, exercise.cases, strict=True)):
        return IN_PLACE if spoilt else ""
    named = [mistake.says for mistake in exercise.mistakes if _agrees(mistake.answer, exercise.cases, got)]
    return named[0] if named else _first_difference(exercise, got)


def _untouched(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether arrays and tensors among the arguments still have their values."""
    arrays = [(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, torch.Tensor | np.ndarray)]
    return all(same(a, b) for a, b in arrays)


def _agrees(wrong: Callable[..., Any], cases: Sequence[Case], got: Sequence[Any]) -> bool:
    """Whether the wrong function gives just these answers; one that cannot take an input makes no such answer."""
    try:
        return all(same(one, wrong(*map(_copy, case.args))) for one, case in zip(got, cases, strict=True))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return False


def _first_difference(exercise: Exercise, got: Sequence[Any]) -> str:
    case, one = next((c, g) for c, g in zip(exercise.cases, got, strict=True) if not same(g, c.gives))
    expected, given = _form(case.gives), _form(one)
    if expected != given and case.gives is not None and one is not None:
        return f"for {_inputs(exercise, case)} expected {expected}, got {given}"
    return f"for {_inputs(exercise, case)} the answer is {_short(case.gives)}, yours is {_short(one)}"


def _inputs(exercise: Exercise, case: Case) -> str:
    names = inspect.signature(exercise.solution).parameters
    return ", ".join(f"{name} = {_short(value, 70)}" for name, value in zip(names, case.args, strict=False))


def same(a: Any, b: Any) -> bool:
    """Whether two answers are the same: numbers within 1e-5, arrays and tensors with their shapes, the rest exactly.

    >>> same({"te": 1.0}, {"te": 1.0000001}), same([1, 2], np.array([1, 2])), same(1, [1, 1])
    (True, True, False)
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if a is None or b is None or isinstance(a, str) or isinstance(b, str):
        return bool(a is b or (isinstance(a, str) and a == b))
    left, right = _array(a), _array(b)
    if left.shape != right.shape or left.dtype.kind not in "biuf" or right.dtype.kind not in "biuf":
        return left.shape == right.shape and left.tolist() == right.tolist()
    return bool(np.allclose(left.astype(float), right.astype(float), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True))


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _copy(value: Any) -> Any:
    """An answer that works in place must not change the next case."""
    return value.clone() if isinstance(value, torch.Tensor) else value.copy() if hasattr(value, "copy") else value


def _form(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary with the keys {', '.join(map(str, value))}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, str) or value is None:
        return "a text" if value is not None else "None"
    shape = _array(value).shape
    return f"a result of shape {shape}" if shape else "one value"


def _short(value: Any, length: int = 160) -> str:
    if callable(value) or (isinstance(value, list) and value and all(map(callable, value))):
        return "a function" if callable(value) else f"{len(value)} functions"
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 3] + "..."
