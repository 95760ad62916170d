"""Exercises of notebook 07: a bound for no errors, whose error rate, and whether intervals hold what they promise."""

import numpy as np
from scipy.stats import beta

from exercises.judging import Case, Exercise, Mistake


def upper_bound(errors: int, n: int) -> float:
    """One-sided exact 95 % upper bound of an error rate (Clopper-Pearson); with all n wrong it is 1.

    It is the rate at which at most `errors` errors in n draws turn up with probability 0.05.
    """
    return 1.0 if errors == n else float(beta.ppf(0.95, errors + 1, n - errors))


def false_supported(truth: list[bool | None], verdicts: list[str]) -> float:
    """Error rate: how often a claim that is *false* is called "supported"; at least one is false.

    A truth of None is open, and does not count.
    """
    of_false = [said for built, said in zip(truth, verdicts, strict=True) if built is False]
    return of_false.count("supported") / len(of_false)


def coverage(low: np.ndarray, high: np.ndarray, truth: np.ndarray) -> float:
    """Share of intervals that hold the truth, all of shape (draw,); the ends belong to an interval."""
    return float(((low <= truth) & (truth <= high)).mean())


TRUTH = [True, False, False, None, False, True, None, False, True, True, False, True]
SAID = [
    *("supported", "supported", "inconclusive", "supported", "contradicted", "inconclusive"),
    *("contradicted", "inconclusive", "supported", "supported", "contradicted", "supported"),
]
LOW = np.array([0.1, 0.5, 0.2, 0.6, -0.2, -0.3, -0.1, -0.1, 8.0, -0.2])
HIGH = np.array([0.4, 0.9, 0.3, 0.8, 0.2, 0.5, 0.3, 0.1, 8.0, 0.7])
AT = np.array([0.3, 0.4, 0.5, 0.7, 0.0, 0.6, 0.1, 0.0, 8.0, 0.5])


def _rate(truth: list[bool | None], verdicts: list[str], kept: tuple[bool | None, ...]) -> float:
    chosen = [said for built, said in zip(truth, verdicts, strict=True) if built in kept]
    return chosen.count("supported") / len(chosen)


EXERCISES = (
    Exercise(
        "07-1",
        "Error rate of what?",
        1,
        8,
        "Write `false_supported`. Which draws are its denominator?",
        "The condition comes first: among the draws in which the claim is false.",
        false_supported,
        (Case((TRUTH, SAID), 0.2),),
        (
            Mistake(
                "over all draws: the more true claims are drawn, the better any rule looks. Divide by the false ones",
                lambda t, v: sum(b is False and s == "supported" for b, s in zip(t, v, strict=True)) / len(t),
            ),
            Mistake(
                "that is the share of wrong among the *supported*: another question, and it depends on how often claims are true",
                lambda t, v: (
                    sum(b is False and s == "supported" for b, s in zip(t, v, strict=True)) / v.count("supported")
                ),
            ),
            Mistake(
                "open truths were counted as false: `not None` is True; ask `is False`",
                lambda t, v: _rate(t, v, (False, None)),
            ),
            Mistake(
                "'inconclusive' was counted as an error: it is no answer, and only 'supported' is wrong of a false claim",
                lambda t, v: (
                    sum(b is False and s != "contradicted" for b, s in zip(t, v, strict=True)) / t.count(False)
                ),
            ),
            Mistake("that is the power, among the *true* claims", lambda t, v: _rate(t, v, (True,))),
        ),
    ),
    Exercise(
        "07-2",
        "No error seen: how sure is that?",
        2,
        10,
        "Write `upper_bound`: the largest error rate at which this many errors, or fewer, would still turn up in 5 % of "
        "samples (Clopper and Pearson's one-sided bound, a quantile of the beta distribution). How many "
        "draws without an error does it take to show that a rate is at most 5 %?",
        "`beta.ppf` (of `scipy.stats`) at 0.95, with the parameters `errors + 1` and `n - errors`; without an error the bound is "
        "$1 - 0.05^{1/n}$.",
        upper_bound,
        (Case((0, 59), 0.0495064), Case((1, 10), 0.3941633), Case((3, 3), 1.0)),
        (
            Mistake(
                "two-sided: the upper end of a 95 % interval leaves out 2.5 % above, a one-sided bound 5 %",
                lambda k, n: 1.0 if k == n else float(beta.ppf(0.975, k + 1, n - k)),
            ),
            Mistake("the rate itself is no bound: no error among few draws proves little", lambda k, n: k / n),
            Mistake(
                "off by one: the upper end takes Beta(k + 1, n - k); Beta(k, n - k + 1) belongs to the lower end",
                lambda k, n: 0.0 if k == 0 else float(beta.ppf(0.95, k, n - k + 1)),
            ),
            Mistake(
                "the rule of three (3 / n) is an approximation and holds for no errors only",
                lambda k, n: 3 / n,
            ),
            Mistake(
                "that is the bound for no errors: with errors it takes the quantile of a Beta distribution",
                lambda k, n: 1 - 0.05 ** (1 / n),
            ),
            Mistake(
                "with all n wrong Beta(n + 1, 0) is not defined: the bound is 1",
                lambda k, n: float(beta.ppf(0.95, k + 1, n - k)),
            ),
        ),
    ),
    Exercise(
        "07-3",
        "Do intervals keep their promise?",
        1,
        5,
        "Write `coverage`: what share of 95 % intervals holds the value that is true of the population?",
        "Compare with both ends, draw by draw, and take the mean.",
        coverage,
        (Case((LOW, HIGH, AT), 0.7),),
        (
            Mistake(
                "the ends belong to the interval: one of no width (a whole number such as k90, say) holds its own value",
                lambda a, b, t: float(((a < t) & (t < b)).mean()),
            ),
            Mistake(
                "every draw has its own true value: compare draw by draw, not with their mean",
                lambda a, b, t: float(((a <= t.mean()) & (t.mean() <= b)).mean()),
            ),
            Mistake("one side only: the truth can also lie above the interval", lambda a, b, t: float((a <= t).mean())),
            Mistake("one side only: the truth can also lie below the interval", lambda a, b, t: float((t <= b).mean())),
            Mistake(
                "that is the share of intervals that *miss* the truth",
                lambda a, b, t: float(((t < a) | (t > b)).mean()),
            ),
            Mistake(
                "that is the share that excludes 0: a test of another question",
                lambda a, b, t: float((a * b > 0).mean()),
            ),
        ),
    ),
)
