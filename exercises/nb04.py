"""Exercises of notebook 04: how few neurons, which are sure, and what an index means."""

import numpy as np
import torch

from exercises.judging import Case, Exercise, Mistake


def k90(share: np.ndarray) -> int | None:
    """k90 of a curve: `share[k - 1]` is the joint effect of the top k neurons over the whole layer's.

    The smallest k whose share is at least 0.9 and after which it stays within [0.9, 1.1] for all larger k; None if there
    is none. At k itself the share may be above 1.1.
    """
    inside = (share >= 0.9) & (share <= 1.1)
    for k in range(1, len(share) + 1):
        if share[k - 1] >= 0.9 and inside[k:].all():
            return k
    return None


def sure(p: np.ndarray, level: float = 0.05) -> np.ndarray:
    """Which of m p-values, shape (m,), pass Benjamini-Yekutieli at `level`; a boolean for each."""
    m = len(p)
    order = np.argsort(p, kind="stable")
    line = level * np.arange(1, m + 1) / (m * (1 / np.arange(1, m + 1)).sum())
    below = np.flatnonzero(p[order] <= line)
    passed = np.zeros(m, dtype=bool)
    passed[order[: below[-1] + 1 if len(below) else 0]] = True
    return passed


def shuffle_neurons(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same MLP with its neurons in another order: new neuron i is old neuron `order[i]`.

    Weights as PyTorch keeps them: `gate` and `up` (neuron, width), `down` (width, neuron).
    """
    return gate[order], up[order], down[:, order]


def _first_crossing(share: np.ndarray) -> int | None:
    found = np.flatnonzero(share >= 0.9)
    return int(found[0]) + 1 if len(found) else None


def _no_ceiling(share: np.ndarray) -> int | None:
    below = np.flatnonzero(share < 0.9)
    k = int(below[-1]) + 2 if len(below) else 1
    return k if k <= len(share) else None


def _index(share: np.ndarray) -> int | None:
    k = k90(share)
    return None if k is None else k - 1


def _ceiling_at_k(share: np.ndarray) -> int | None:
    outside = np.flatnonzero((share < 0.9) | (share > 1.1))
    k = int(outside[-1]) + 2 if len(outside) else 1
    return k if k <= len(share) else None


def _open_band(share: np.ndarray) -> int | None:
    return k90(np.where((share == 0.9) | (share == 1.1), 0.0, share))


def _step_down(p: np.ndarray, level: float = 0.05) -> np.ndarray:
    """Ranks pass until the first one above its line."""
    m, order = len(p), np.argsort(p, kind="stable")
    line = level * np.arange(1, m + 1) / (m * (1 / np.arange(1, m + 1)).sum())
    passed = np.zeros(m, dtype=bool)
    passed[order] = np.cumprod(p[order] <= line).astype(bool)
    return passed


def _from_zero(p: np.ndarray, level: float = 0.05) -> np.ndarray:
    m, rising = len(p), np.sort(p)
    below = np.flatnonzero(rising <= level * np.arange(m) / (m * (1 / np.arange(1, m + 1)).sum()))
    return p <= (rising[below[-1]] if len(below) else -1.0)


def _hochberg(p: np.ndarray, level: float = 0.05) -> np.ndarray:
    m = len(p)
    return sure(p, level * (1 / np.arange(1, m + 1)).sum())


def _no_step_up(p: np.ndarray, level: float = 0.05) -> np.ndarray:
    m, rank = len(p), np.argsort(np.argsort(p, kind="stable"), kind="stable") + 1
    return p <= level * rank / (m * (1 / np.arange(1, m + 1)).sum())


CURVE = np.array([0.5, 0.93, 1.2, 1.15, 0.85, 0.95, 1.05, 1.0])
OVERSHOOTS = np.array([0.4, 0.95, 1.3, 1.05, 1.0])
EDGES = np.array([0.5, 0.9, 1.1, 1.0])
WRONG_WAY = np.array([0.2, 0.1, -0.3])
P_VALUES = np.array([0.2, 0.001, 0.0085, 0.013, 0.9, 0.0088])  # BY's lines: 0.0034, 0.0068, 0.0102, 0.0136, ...
GATE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
UP, DOWN, ORDER = GATE + 10, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([2, 0, 1])


EXERCISES = (
    Exercise(
        "04-1",
        "Thousands of tests that depend on each other",
        3,
        15,
        "Write `sure`: Benjamini-Yekutieli. Sort the p-values; the line for rank k is level · k / (m · c) with "
        "$c = 1 + 1/2 + \\dots + 1/m$; everything up to the *last* rank at or below its line passes.",
        "Find the largest rank that is at or below its own line, and let all smaller ranks pass with it. Then undo the sorting.",
        sure,
        (
            Case((P_VALUES,), np.array([False, True, True, True, False, True])),
            Case((np.array([0.02, 0.04, 0.03]),), np.array([False, False, False])),
            Case((np.array([0.02, 0.045, 0.9]),), np.array([False, False, False])),
            Case((np.array([0.018, 0.005, 0.5]),), np.array([True, True, False])),
            Case((np.array([0.018, 0.005, 0.1]), 0.2), np.array([True, True, True])),
        ),
        (
            Mistake(
                "Benjamini-Hochberg instead of Benjamini-Yekutieli: the sum 1 + 1/2 + ... + 1/m is missing, and with it the "
                "protection under any dependence",
                _hochberg,
            ),
            Mistake(
                "Bonferroni: safe, and for a sparse set among thousands far too strict",
                lambda p, level=0.05: p <= level / len(p),
            ),
            Mistake(
                "each p-value is held against its own line only: all ranks before the last one below the line pass, too",
                _no_step_up,
            ),
            Mistake(
                "no correction at all: of 1,000 neurons without effect 50 would pass", lambda p, level=0.05: p <= level
            ),
            Mistake(
                "it stops at the first rank above its line: what counts is the *last* rank below its line", _step_down
            ),
            Mistake(
                "the answer is in sorted order: put every verdict back to its own p-value",
                lambda p, level=0.05: sure(np.sort(p), level),
            ),
            Mistake("ranks start at 1: with 0 the smallest p-value is held against a line of 0", _from_zero),
            Mistake("`level` is not used", lambda p, level=0.05: sure(p)),
        ),
    ),
    Exercise(
        "04-2",
        "When has a curve arrived?",
        2,
        10,
        "Write `k90`. A curve may overshoot and come back, so the first crossing is not the answer. The band binds all *larger* "
        "k. At k itself only 0.9 is asked: [0.5, 1.2, 1.0] has arrived at 2.",
        "Look from the right, for the last k outside the band. If it lies below the band, the answer is k + 1 (None if there "
        "is no "
        "such k); if it lies above, the answer is k.",
        k90,
        (
            Case((CURVE,), 6),
            Case((OVERSHOOTS,), 3),
            Case((WRONG_WAY,), None),
            Case((np.array([1.0, 1.0]),), 1),
            Case((EDGES,), 2),
        ),
        (
            Mistake(
                "the first crossing: the curve leaves the band again later, so it had not arrived", _first_crossing
            ),
            Mistake(
                "off by one: `share[0]` belongs to k = 1, so an index is one less than a number of neurons", _index
            ),
            Mistake(
                "no ceiling: a curve that still goes above 1.1 after k has not arrived; what is added must keep below, too",
                _no_ceiling,
            ),
            Mistake(
                "the band was asked of k itself: there at least 0.9 is enough, and [0.9, 1.1] holds for all larger k",
                _ceiling_at_k,
            ),
            Mistake("the ends of the band belong to it: 0.9 has arrived, and 1.1 has not left", _open_band),
            Mistake(
                "where the curve never arrives the answer is None, not the number of neurons",
                lambda share: k90(share) or len(share),
            ),
        ),
    ),
    Exercise(
        "04-3",
        "The same function in another order",
        1,
        8,
        "Write `shuffle_neurons`. The MLP is `down @ (act(gate @ x) * (up @ x))`, and its output must not change; a picture "
        "of windows "
        "over neuron numbers does.",
        "A neuron owns one row of `gate`, the same row of `up`, and the same *column* of `down`.",
        shuffle_neurons,
        (Case((GATE, UP, DOWN, ORDER), (GATE[[2, 0, 1]], UP[[2, 0, 1]], DOWN[:, [2, 0, 1]])),),
        (
            Mistake(
                "indices permuted on one side only: `down` still reads the neurons in the old order, another function",
                lambda g, u, d, o: (g[o], u[o], d),
            ),
            Mistake(
                "`down` was permuted the other way round (the inverse order): all three take the same `order`",
                lambda g, u, d, o: (g[o], u[o], d[:, o.argsort()]),
            ),
            Mistake(
                "gate and up went apart: a neuron is gate times up, and both rows must move together",
                lambda g, u, d, o: (g[o], u, d[:, o]),
            ),
            Mistake(
                "the inverse order: new neuron i is old neuron `order[i]`, that is, weights are indexed with `order`",
                lambda g, u, d, o: shuffle_neurons(g, u, d, o.argsort()),
            ),
        ),
    ),
)
