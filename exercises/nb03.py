"""Exercises of notebook 03: a direct effect, a share of modules, one head's write."""

from collections.abc import Callable

import numpy as np
import torch

from exercises.judging import Case, Exercise, Mistake


def direct_effect(
    final: torch.Tensor, control_write: torch.Tensor, treated_write: torch.Tensor, outcome: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Direct effect of one component in the control run; vectors have shape (width,), and `outcome` maps one to a number.

    `final` is the control run's final residual stream, the writes are what the component adds to it in the two runs.
    """
    return outcome(final - control_write + treated_write) - outcome(final)


def mlp_share(is_mlp: np.ndarray, discover: np.ndarray, test: np.ndarray) -> float:
    """MLPs' share of the test effects of the components that count; all arrays have shape (component,).

    A component counts if its effect on discover is above 0.
    """
    counted = discover > 0
    return float(test[counted & is_mlp].sum() / test[counted].sum())


def head_write(z: torch.Tensor, weight: torch.Tensor, head: int, n_heads: int) -> torch.Tensor:
    """What one head adds to the residual stream, shape (width,).

    `z` (heads * head width,) is the input of the output projection, `weight` (width, heads * head width) its weight.
    """
    size = len(z) // n_heads
    own = slice(head * size, (head + 1) * size)
    return weight[:, own] @ z[own]


def _norm_read(x: torch.Tensor) -> torch.Tensor:
    return x[0] / x.pow(2).mean().sqrt()


def _interleaved(z: torch.Tensor, output: torch.Tensor, head: int, n_heads: int) -> torch.Tensor:
    return output[:, head::n_heads] @ z[head::n_heads]


def _rows(z: torch.Tensor, output: torch.Tensor, head: int, n_heads: int) -> torch.Tensor:
    size = len(z) // n_heads
    return output[head * size : (head + 1) * size] @ z


def _number_as_width(z: torch.Tensor, output: torch.Tensor, head: int, n_heads: int) -> torch.Tensor:
    own = slice(head * n_heads, (head + 1) * n_heads)
    return output[:, own] @ z[own]


def _one_too_low(z: torch.Tensor, output: torch.Tensor, head: int, n_heads: int) -> torch.Tensor:
    size = len(z) // n_heads
    own = slice((head - 1) * size, head * size)
    return output[:, own] @ z[own]


FINAL = torch.tensor([3.0, 4.0])
WRITE = (torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]))
Z = torch.tensor([1.0, 2.0, 3.0, 4.0])
OUTPUT = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, -1.0, 1.0], [1.0, 1.0, 0.0, 2.0], [2.0, 0.0, 1.0, 0.0]])
THREE_HEADS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
WIDE = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 2.0], [0.0, 1.0, -1.0, 1.0, 3.0, 0.0]])
IS_MLP = np.array([False, True, False, True, True])
DISCOVER = np.array([2.0, 3.0, 1.0, -0.1, 0.4])
TEST = np.array([2.0, 4.0, 1.0, 0.5, -1.0])


EXERCISES = (
    Exercise(
        "03-1",
        "Writing, not passing through",
        1,
        8,
        "Write `direct_effect`. No layer is run again: the component's write is exchanged in the sum, and the sum is read out.",
        "Take out what the component wrote in the control run before you put in what it wrote in the treated run.",
        direct_effect,
        (
            Case((FINAL, *WRITE, _norm_read), torch.tensor(1.4142136 - 0.8485281)),
            Case(
                (FINAL, torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]), _norm_read),
                torch.tensor(0.1754116 - 0.8485281),
            ),
        ),
        (
            Mistake(
                "the control run's write is still in the sum: subtract it before the treated one is added",
                lambda f, a, b, y: y(f + b) - y(f),
            ),
            Mistake(
                "the wrong direction: the treated write was taken out and the control's put in",
                lambda f, a, b, y: y(f - b + a) - y(f),
            ),
            Mistake(
                "the outcome of the difference of writes is not the difference of outcomes: the final norm sees the whole sum",
                lambda f, a, b, y: y(b - a),
            ),
            Mistake(
                "the outcome itself and not its change: subtract the clean outcome", lambda f, a, b, y: y(f - a + b)
            ),
            Mistake(
                "the sign: the outcome with the treated write minus the clean outcome",
                lambda f, a, b, y: y(f) - y(f - a + b),
            ),
            Mistake(
                "the two writes were read out alone: the final norm must see the whole sum, with the others' writes",
                lambda f, a, b, y: y(b) - y(a),
            ),
            Mistake(
                "the write was only taken out: that removes the component, and is no exchange for its treated write",
                lambda f, a, b, y: y(f - a) - y(f),
            ),
        ),
    ),
    Exercise(
        "03-2",
        "The MLPs' share, chosen on one split and measured on another",
        2,
        8,
        "Write `mlp_share`. A component counts if its effect is above 0 on *discover*; on *test* it then counts whatever its "
        "sign there. Why must *test* not decide?",
        "One mask from `discover`, used for numerator and denominator alike.",
        mlp_share,
        (
            Case((IS_MLP, DISCOVER, TEST), 0.5),
            Case(
                (np.array([True, False, True, False]), np.array([1.0, 2.0, 0.5, -1.0]), np.array([5.0, 2, 1, 3])), 0.75
            ),
        ),
        (
            Mistake(
                "the positive ones were chosen on the test split: noise above zero is then counted, noise below is not",
                lambda mlp, d, t: float(t[mlp & (t > 0)].sum() / t[t > 0].sum()),
            ),
            Mistake(
                "what is negative on test was left out, too: whoever was chosen on discover counts with its sign on test",
                lambda mlp, d, t: float(t[mlp & (d > 0) & (t > 0)].sum() / t[(d > 0) & (t > 0)].sum()),
            ),
            Mistake(
                "the denominator has all components: it takes those chosen on discover, as the numerator does",
                lambda mlp, d, t: float(t[mlp & (d > 0)].sum() / t.sum()),
            ),
            Mistake(
                "components were counted, not their effects added",
                lambda mlp, d, t: float((mlp & (d > 0)).sum() / (d > 0).sum()),
            ),
            Mistake(
                "all components are in: what works against the treatment makes a share larger than 1 or smaller than 0",
                lambda mlp, d, t: float(t[mlp].sum() / t.sum()),
            ),
            Mistake(
                "absolute values: a component that works against the treatment then counts for it",
                lambda mlp, d, t: float(np.abs(t[mlp]).sum() / np.abs(t).sum()),
            ),
            Mistake(
                "the discover split's own effects were summed: choose on discover, measure on test",
                lambda mlp, d, t: float(d[mlp & (d > 0)].sum() / d[d > 0].sum()),
            ),
            Mistake(
                "that is MLP over attention, an odds: a share divides by both together",
                lambda mlp, d, t: float(t[mlp & (d > 0)].sum() / t[~mlp & (d > 0)].sum()),
            ),
        ),
    ),
    Exercise(
        "03-3",
        "One head of many",
        2,
        10,
        "Write `head_write`. The heads lie one behind the other in `z`; the sum over heads must be the whole attention output.",
        "A head owns a slice of `z` and the same slice of the weight's *columns*.",
        head_write,
        (
            Case((Z, OUTPUT, 1, 2), torch.tensor([10.0, 1.0, 8.0, 3.0])),
            Case((Z, OUTPUT, 0, 2), torch.tensor([1.0, 2.0, 3.0, 2.0])),
            Case((THREE_HEADS, WIDE, 1, 3), torch.tensor([7.0, 1.0])),
        ),
        (
            Mistake(
                "heads are taken as interleaved (0, 2, ... and 1, 3, ...): each head is one contiguous slice",
                _interleaved,
            ),
            Mistake(
                "rows of the weight were sliced: the head's numbers enter through its *columns* (PyTorch stores out x in)",
                _rows,
            ),
            Mistake("the whole attention output: only the slice of one head was asked for", lambda z, o, h, n: o @ z),
            Mistake(
                "all heads but the one asked for: the whole attention output minus what this head writes",
                lambda z, o, h, n: o @ z - head_write(z, o, h, n),
            ),
            Mistake("the slice is as wide as there are heads: a head's width is `len(z) / n_heads`", _number_as_width),
            Mistake("the head is off by one, and head 0 gets an empty slice: heads are counted from 0", _one_too_low),
            Mistake(
                "the head is off by one: heads are counted from 0",
                lambda z, o, h, n: head_write(z, o, (h - 1) % n, n),
            ),
        ),
    ),
)
