"""Exercises of notebook 01: the outcome, the splits, an interval for a rate."""

import math

import torch

from exercises.judging import Case, Exercise, Mistake


def log_odds(logits: torch.Tensor, comply: list[int], refuse: list[int]) -> torch.Tensor:
    """Y1 of each prompt, shape (prompt,), from logits of shape (prompt, position, token); nothing is padded."""
    last = logits[:, -1]
    return last[:, comply].logsumexp(1) - last[:, refuse].logsumexp(1)


def split_by_topic(topics: list[str]) -> list[str]:
    """The split of each pair, given each pair's topic.

    Sort the n distinct topics, n a multiple of ten; the first 0.4 n are "discover", the next 0.3 n "validate", the rest "test".
    """
    distinct = sorted(set(topics))
    place = {topic: number / len(distinct) for number, topic in enumerate(distinct)}
    return ["discover" if place[topic] < 0.4 else "validate" if place[topic] < 0.7 else "test" for topic in topics]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a rate of `hits` out of `n` (z = 1.96), as (low, high)."""
    z, rate = 1.96, hits / n
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return centre - half, centre + half


def _split(place: float) -> str:
    return "discover" if place < 0.4 else "validate" if place < 0.7 else "test"


def _cut_sorted_pairs(topics: list[str]) -> list[str]:
    order = sorted(range(len(topics)), key=lambda pair: topics[pair])
    return [_split(order.index(pair) / len(topics)) for pair in range(len(topics))]


def _camps(last: torch.Tensor, comply: list[int], refuse: list[int]) -> torch.Tensor:
    return last[:, comply].logsumexp(1) - last[:, refuse].logsumexp(1)


def _probabilities(logits: torch.Tensor, comply: list[int], refuse: list[int]) -> torch.Tensor:
    p = logits[:, -1].softmax(1)
    return p[:, comply].sum(1) - p[:, refuse].sum(1)


def _wald(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    rate = hits / n
    half = z * math.sqrt(rate * (1 - rate) / n)
    return rate - half, rate + half


def _clipped(hits: int, n: int) -> tuple[float, float]:
    low, high = _wald(hits, n)
    return max(low, 0.0), min(high, 1.0)


def _wilson_at(hits: int, n: int, z: float) -> tuple[float, float]:
    centre, rate = (hits + z**2 / 2) / (n + z**2), hits / n
    half = z * math.sqrt(rate * (1 - rate) * n + z**2 / 4) / (n + z**2)
    return centre - half, centre + half


def _parts(hits: int, n: int, centre: float, divisor: float, z: float = 1.96) -> tuple[float, float]:
    rate = hits / n
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / divisor
    return centre - half, centre + half


# Three positions, five tokens; the logits are logarithms, so the log-sum-exps can be done in the head.
LOGITS = torch.tensor(
    [[[4.0, 1, 1, 1, 1], [1, 1, 1, 1, 2], [3, 3, 2, 1, 9]], [[1.0, 2, 3, 1, 1], [5, 1, 2, 2, 1], [1, 1, 5, 3, 1]]]
).log()
TOPICS = ["c", "a", "b", "a", "e", "d", "a", "c", "b", "j", "f", "g", "h", "i"]
SPLITS = ["d", "d", "d", "d", "v", "d", "d", "d", "d", "t", "v", "v", "t", "t"]
EXCHANGED = {"validate": "test", "test": "validate"}
NAMES = {"d": "discover", "v": "validate", "t": "test"}


EXERCISES = (
    Exercise(
        "01-1",
        "A topic belongs to one split",
        1,
        8,
        "Write `split_by_topic`: choices made on *discover* must not have seen the topics that *test* reports. "
        "Sort the topics; the first 40 % are *discover*, the next 30 % *validate*, the rest *test*.",
        "Make a dictionary from topic to split first, and look every pair up in it.",
        split_by_topic,
        (Case((TOPICS,), [NAMES[letter] for letter in SPLITS]),),
        (
            Mistake(
                "a topic is split across folds: pairs were dealt out, not topics, so test has seen discover's words",
                lambda topics: [_split(place / len(topics)) for place in range(len(topics))],
            ),
            Mistake(
                "a topic is split across folds: the pairs were sorted by topic and then cut at 40 % and 70 % of the pairs",
                _cut_sorted_pairs,
            ),
            Mistake(
                "topics are in order of appearance: sort them first, or the split changes with the order of the file",
                lambda topics: [_split(list(dict.fromkeys(topics)).index(t) / len(set(topics))) for t in topics],
            ),
            Mistake(
                "validate and test are exchanged: first 40 % discover, then 30 % validate, the rest test",
                lambda topics: [EXCHANGED.get(one, one) for one in split_by_topic(topics)],
            ),
        ),
    ),
    Exercise(
        "01-2",
        "From logits to log-odds",
        1,
        8,
        "Write `log_odds`: log p(any opener that complies) − log p(any opener that refuses), for the first token of the answer. "
        "Both lists are short here: all other tokens count for neither.",
        "The probability of a camp is the *sum* of its tokens' probabilities; its logarithm is a log-sum-exp of logits.",
        log_odds,
        (Case((LOGITS, [0, 1], [2, 3]), torch.tensor([2.0, 0.25]).log()),),
        (
            Mistake(
                "the position is off by one: the first answer token is predicted *at* the last token, index -1",
                lambda z, c, r: _camps(z[:, -2], c, r),
            ),
            Mistake(
                "that is a difference of probabilities (softmax), not log-odds: it saturates where log-odds do not",
                _probabilities,
            ),
            Mistake(
                "the largest logit stands for its camp: several openers share the probability, so take logsumexp",
                lambda z, c, r: z[:, -1][:, c].max(1).values - z[:, -1][:, r].max(1).values,
            ),
            Mistake(
                "logits were averaged or added: add probabilities, that is, take logsumexp",
                lambda z, c, r: z[:, -1][:, c].mean(1) - z[:, -1][:, r].mean(1),
            ),
            Mistake(
                "logits or log-probabilities of a camp were added: that multiplies probabilities; take logsumexp",
                lambda z, c, r: z[:, -1][:, c].sum(1) - z[:, -1][:, r].sum(1),
            ),
            Mistake(
                "that is log p / (1 − p) of complying: here complying stands against *refusing*, not against all else",
                lambda z, c, r: z[:, -1].softmax(1)[:, c].sum(1).logit(),
            ),
            Mistake(
                "the ratio of the two probabilities: its logarithm is missing",
                lambda z, c, r: _camps(z[:, -1], c, r).exp(),
            ),
            Mistake(
                "that is the first position: the first answer token is predicted at the last one",
                lambda z, c, r: _camps(z[:, 0], c, r),
            ),
            Mistake("the sign: complying is up, so comply minus refuse", lambda z, c, r: _camps(z[:, -1], r, c)),
        ),
    ),
    Exercise(
        "01-3",
        "An interval for a rate of zero",
        2,
        10,
        "No refusal among 20 harmless prompts: what is the interval of the refusal rate? Write `wilson`: all rates p with "
        "$|\\hat p - p| \\le z\\sqrt{p(1-p)/n}$, where $\\hat p$ is the rate that was seen. (Solved for p, the centre is "
        "$\\hat p + z^2/2n$, the half-width $z\\sqrt{\\hat p(1-\\hat p)/n + z^2/4n^2}$, and both are divided by $1 + z^2/n$.)",
        "With 0 hits the low end is 0 and the high end is z² / (n + z²): never an interval of no width.",
        wilson,
        (Case((0, 20), (0.0, 0.161130)), Case((5, 10), (0.236593, 0.763407)), Case((48, 50), (0.865402, 0.988958))),
        (
            Mistake(
                "that is Wald's interval, the rate plus or minus z standard errors: with 0 hits it has no width at all",
                _wald,
            ),
            Mistake(
                "that is Wald's interval cut at 0 and 1: cutting does not give it a width where the rate is 0", _clipped
            ),
            Mistake(
                "z = 1.645 makes a 90 % interval (one-sided 95 %): two-sided 95 % takes 1.96",
                lambda hits, n: _wilson_at(hits, n, 1.645),
            ),
            Mistake(
                "the centre is still the rate itself: it must be pulled towards one half, to p + z²/2n over 1 + z²/n",
                lambda hits, n: _parts(hits, n, hits / n, 1 + 1.96**2 / n),
            ),
            Mistake(
                "the half-width is not divided by 1 + z²/n",
                lambda hits, n: _parts(hits, n, sum(wilson(hits, n)) / 2, 1.0),
            ),
            Mistake(
                "centre and half-width are not divided by 1 + z²/n",
                lambda hits, n: _parts(hits, n, hits / n + 1.96**2 / (2 * n), 1.0),
            ),
            Mistake(
                "the factor z in front of the square root is missing",
                lambda hits, n: _parts(hits, n, sum(wilson(hits, n)) / 2, 1.96 * (1 + 1.96**2 / n)),
            ),
            Mistake(
                "low and high are exchanged, or the half-width has the wrong sign",
                lambda hits, n: wilson(hits, n)[::-1],
            ),
        ),
    ),
)
