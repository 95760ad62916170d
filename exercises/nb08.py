"""Exercises of notebook 08: what a control may do to a verdict, and what the unit of an interval is."""

import numpy as np

from exercises.judging import Case, Exercise, Mistake


def capped(verdict: str, controls: dict[str, str]) -> str:
    """The verdict after its controls, each "passed", "failed" or "not run"; others are not in it.

    Anything but "passed" caps "supported" and "contradicted" at "inconclusive"; "not testable" stays what it is.
    """
    stopped = any(outcome != "passed" for outcome in controls.values())
    return "inconclusive" if stopped and verdict in ("supported", "contradicted") else verdict


def standard_error(effect: np.ndarray, topic: np.ndarray) -> float:
    """Standard error of the mean effect with topics as the unit; both (pair,), the same number of pairs in every topic."""
    means = np.array([effect[topic == name].mean() for name in np.unique(topic)])
    return float(means.std(ddof=1) / np.sqrt(len(means)))


PASSED, FAILED, ABSENT = {"twin": "passed"}, {"twin": "failed"}, {"twin": "passed", "norm": "not run"}
EFFECT = np.array([1.0, 1.2, 0.8, 3.0, 3.0, 3.0, 5.0, 5.3, 4.7])
TOPIC = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])


def _only_failed(verdict: str, controls: dict[str, str]) -> str:
    return capped(verdict, {name: "passed" if out == "not run" else out for name, out in controls.items()})


def _turned(verdict: str, controls: dict[str, str]) -> str:
    stopped = capped(verdict, controls) != verdict
    return {"supported": "contradicted", "contradicted": "supported"}[verdict] if stopped else verdict


def _capable(verdict: str) -> bool:
    return verdict in ("supported", "contradicted")


def _always(verdict: str, controls: dict[str, str]) -> str:
    return "inconclusive" if any(outcome != "passed" for outcome in controls.values()) else verdict


EXERCISES = (
    Exercise(
        "08-1",
        "The unit is the topic",
        2,
        8,
        "Write `standard_error`. Nine pairs over three topics: how many independent observations are there?",
        "Average within topics first; then it is the ordinary standard error of a mean over topics.",
        standard_error,
        (Case((EFFECT, TOPIC), 1.1547005),),
        (
            Mistake(
                "pairs were the unit: pairs of one topic share their words, and the interval comes out too narrow",
                lambda e, t: float(e.std(ddof=1) / np.sqrt(len(e))),
            ),
            Mistake(
                "the spread is that of pairs: average within topics first, and take the spread of those averages",
                lambda e, t: float(e.std(ddof=1) / np.sqrt(len(np.unique(t)))),
            ),
            Mistake(
                "a standard deviation, not a standard error: divide by the square root of the number of topics",
                lambda e, t: standard_error(e, t) * float(np.sqrt(len(np.unique(t)))),
            ),
            Mistake(
                "ddof=0: with few topics that is too small; the mean was estimated from them, so divide by T - 1",
                lambda e, t: standard_error(e, t) * float(np.sqrt(1 - 1 / len(np.unique(t)))),
            ),
            Mistake(
                "divided by the square root of the number of *pairs*: there are only as many observations as topics",
                lambda e, t: standard_error(e, t) * float(np.sqrt(len(np.unique(t)) / len(e))),
            ),
        ),
    ),
    Exercise(
        "08-2",
        "What a control may do",
        1,
        5,
        "Write `capped`. A control that failed, or that was not run, takes a verdict away; none can give one.",
        'Ask for `!= "passed"`, not for `== "failed"`.',
        capped,
        (
            Case(("supported", PASSED), "supported"),
            Case(("supported", FAILED), "inconclusive"),
            Case(("contradicted", ABSENT), "inconclusive"),
            Case(("contradicted", FAILED), "inconclusive"),
            Case(("not testable", FAILED), "not testable"),
            Case(("contradicted", {}), "contradicted"),
        ),
        (
            Mistake("a control that was not run has not passed: it caps the verdict as well", _only_failed),
            Mistake(
                "every control must have passed: one that has not is enough to cap (`any`, not `all`)",
                lambda v, c: "inconclusive" if _capable(v) and all(out != "passed" for out in c.values()) else v,
            ),
            Mistake(
                "two things: a control that was not run has not passed, and 'not testable' stays what it is",
                lambda v, c: "inconclusive" if "failed" in c.values() else v,
            ),
            Mistake("a failed control does not prove the opposite: it leaves the question open", _turned),
            Mistake(
                "'not testable' was turned into 'inconclusive': a control cannot add evidence that is missing", _always
            ),
            Mistake(
                "only 'supported' was capped: 'contradicted' rests on the same controls",
                lambda v, c: v if v == "contradicted" else capped(v, c),
            ),
        ),
    ),
)
