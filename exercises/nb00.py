"""Exercises of notebook 00: the four cells, and what an interval may say."""

from exercises.judging import Case, Exercise, Mistake


def effects(y00: float, y01: float, y10: float, y11: float) -> dict[str, float]:
    """A dict with keys "TE", "NIE0", "NIE1", "INT", from the four cells.

    First digit: the prompt, second digit: the mediator's value. INT is the interaction, NIE1 - NIE0.
    """
    nie0 = y01 - y00
    nie1 = y11 - y10
    return {"TE": y11 - y00, "NIE0": nie0, "NIE1": nie1, "INT": nie1 - nie0}


def verdict(low: float, high: float, supported_from: float, contradicted_to: float) -> str:
    """The verdict on an interval [low, high]: "supported", "contradicted" or "inconclusive"."""
    if low >= supported_from:
        return "supported"
    if high <= contradicted_to:
        return "contradicted"
    return "inconclusive"


def _cells(te: float, nie0: float, nie1: float, interaction: float) -> dict[str, float]:
    return {"TE": te, "NIE0": nie0, "NIE1": nie1, "INT": interaction}


def _at_the_middle(low: float, high: float, supported_from: float, contradicted_to: float) -> str:
    middle = (low + high) / 2
    return verdict(middle, middle, supported_from, contradicted_to)


EXERCISES = (
    Exercise(
        "00-1",
        "Four cells, four effects",
        1,
        5,
        "Write `effects`, which turns the four cells of one pair and one mediator into TE, NIE0, NIE1 and INT.",
        "NIE0 stays in the first row of the table (control prompt), NIE1 in the second (treated prompt).",
        effects,
        (
            Case((-3.0, -1.0, -2.0, 4.0), _cells(7.0, 2.0, 6.0, 4.0)),
            Case((0.0, 1.0, 3.0, 3.5), _cells(3.5, 1.0, 0.5, -0.5)),
        ),
        (
            Mistake(
                "prompt and mediator are exchanged: y01 is the *control* prompt with the *treated* mediator",
                lambda a, b, c, d: effects(a, c, b, d),
            ),
            Mistake(
                "NIE1 belongs to the treated row: y11 - y10. y10 - y00 is what does *not* pass through the mediator (NDE0)",
                lambda a, b, c, d: _cells(d - a, b - a, c - a, c - a - (b - a)),
            ),
            Mistake(
                "the sign of INT: it is NIE1 - NIE0, so that a component which needs the others gets a positive one",
                lambda a, b, c, d: _cells(d - a, b - a, d - c, (b - a) - (d - c)),
            ),
            Mistake(
                "the sign of NIE1: what the treated run loses without the mediator's treated value is y11 - y10",
                lambda a, b, c, d: _cells(d - a, b - a, c - d, (d - c) - (b - a)),
            ),
            Mistake(
                "INT is not what is missing from TE, but the difference of two effects of one mediator: NIE1 - NIE0",
                lambda a, b, c, d: _cells(d - a, b - a, d - c, (d - a) - (b - a) - (d - c)),
            ),
            Mistake(
                "all signs are turned round: an effect is treated minus control",
                lambda a, b, c, d: _cells(a - d, a - b, c - d, (c - d) - (a - b)),
            ),
        ),
    ),
    Exercise(
        "00-2",
        "What an interval may say",
        1,
        5,
        'Write `verdict`: "supported" if the whole interval lies at or above `supported_from`, "contradicted" if the whole '
        'interval lies at or below `contradicted_to`, else "inconclusive".',
        "A claim is supported by the *lower* end and contradicted by the *upper* end.",
        verdict,
        tuple(
            Case((low, high, 0.5, 0.4), says)
            for low, high, says in (
                (0.55, 0.70, "supported"),
                (0.45, 0.75, "inconclusive"),
                (0.10, 0.38, "contradicted"),
                (0.10, 0.60, "inconclusive"),
                (0.50, 0.60, "supported"),
                (0.42, 0.48, "inconclusive"),
            )
        ),
        (
            Mistake(
                "the estimate in the middle decides, not the interval: a wide interval around a large number proves nothing",
                _at_the_middle,
            ),
            Mistake(
                "the ends are exchanged: 'supported' must hold for the lower end, 'contradicted' for the upper end",
                lambda low, high, s, c: verdict(high, low, s, c),
            ),
            Mistake(
                "what is not supported is not contradicted: there must be room for 'inconclusive'",
                lambda low, high, s, c: "supported" if low >= s else "contradicted",
            ),
            Mistake(
                "`contradicted_to` is not used: an interval between the two thresholds is inconclusive",
                lambda low, high, s, c: verdict(low, high, s, s - 1e-9),
            ),
            Mistake(
                "one end decides everything: 'contradicted' needs the *upper* end at or below `contradicted_to`",
                lambda low, high, s, c: verdict(low, low, s, c),
            ),
            Mistake(
                "*at* a threshold counts: 'at or above' and 'at or below' include it",
                lambda low, high, s, c: verdict(low, high, s + 1e-9, c - 1e-9),
            ),
        ),
    ),
)
