"""Exercises of notebook 02: an interchange by hand, a share of the total effect, a late share."""

from collections.abc import Callable

import numpy as np
import torch

from exercises.judging import Case, Exercise, Mistake

Block = Callable[[torch.Tensor], torch.Tensor]


def patched_nie0(
    blocks: list[Callable], outcome: Callable, control: torch.Tensor, treated: torch.Tensor, layer: int, position: int
) -> torch.Tensor:
    """NIE0 of the residual stream after `blocks[layer]` at one position.

    `control` and `treated` are embeddings of shape (position, width). Each block maps the residual stream to what it
    *adds* to it; `outcome` maps the final residual stream, of shape (position, width), to a number.
    """
    source = treated.clone()
    for block in blocks[: layer + 1]:
        source = source + block(source)
    resid, clean = control.clone(), control.clone()
    for place, block in enumerate(blocks):
        resid, clean = resid + block(resid), clean + block(clean)
        if place == layer:
            resid = resid.clone()
            resid[position] = source[position]
    return outcome(resid) - outcome(clean)


def share_of_te(nie: np.ndarray, te: np.ndarray) -> float:
    """The proportion mediated, psi: a ratio of means over pairs; both arrays have shape (pair,)."""
    return float(nie.sum() / te.sum())


def late_share(effect: np.ndarray) -> float:
    """Share of the positive effects that lies in late layers; `effect` has shape (layer,).

    The depth of layer l of L is (l + 1/2) / L, and late is a depth above 2/3.
    """
    depth = (np.arange(len(effect)) + 0.5) / len(effect)
    positive = np.clip(effect, 0, None)
    return float(positive[depth > 2 / 3].sum() / positive.sum())


def _mix(weight: float) -> Block:
    """A block that adds to each token a nonlinear function of the mean of the tokens up to it."""

    def block(resid: torch.Tensor) -> torch.Tensor:
        seen = resid.cumsum(0) / torch.arange(1, len(resid) + 1)[:, None]
        return weight * seen.flip(1) * seen

    return block


def _read(resid: torch.Tensor) -> torch.Tensor:
    return resid[-1, 0] - 2 * resid[-1, 1]


BLOCKS = [_mix(1.0), _mix(-0.5), _mix(2.0)]
CONTROL = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
TREATED = torch.tensor([[1.0, 0.0], [2.0, 1.0], [1.0, -1.0], [0.0, 2.0]])


def _after(blocks, resid):  # type: ignore[no-untyped-def]
    for block in blocks:
        resid = resid + block(resid)
    return resid


def _clean(blocks, outcome, resid):  # type: ignore[no-untyped-def]
    return outcome(_after(blocks, resid))


def _later_held(blocks, outcome, control, treated, layer, position):  # type: ignore[no-untyped-def]
    below, final = blocks[: layer + 1], _after(blocks, control).clone()
    final[position] += (_after(below, treated) - _after(below, control))[position]
    return outcome(final) - _clean(blocks, outcome, control)


def _embedding_patched(blocks, outcome, control, treated, position):  # type: ignore[no-untyped-def]
    mixed = control.clone()
    mixed[position] = treated[position]
    return _clean(blocks, outcome, mixed) - _clean(blocks, outcome, control)


def _alone(block: Block) -> Block:
    return lambda resid: block(resid) - resid


def _write_patched(blocks, outcome, control, treated, layer, position):  # type: ignore[no-untyped-def]
    below, treated = _after(blocks[:layer], control), _after(blocks[:layer], treated)
    write = blocks[layer](below).clone()
    write[position] = blocks[layer](treated)[position]
    return _clean(blocks[layer + 1 :], outcome, below + write) - _clean(blocks, outcome, control)


def _share(effect: np.ndarray, depth: np.ndarray) -> float:
    positive = np.clip(effect, 0, None)
    return float(positive[depth > 2 / 3].sum() / positive.sum())


def _share_signed(effect: np.ndarray) -> float:
    depth = (np.arange(len(effect)) + 0.5) / len(effect)
    return float(effect[depth > 2 / 3].sum() / effect.sum())


EXERCISES = (
    Exercise(
        "02-1",
        "An interchange without a library",
        2,
        15,
        "Write `patched_nie0` with a plain loop over blocks: run the control prompt, replace the residual stream after one block "
        "at one position by its value in the treated run, go on, and compare with the clean control run.",
        "Two loops: one through the treated run up to and including `layer`, to get the vector at that position; one through "
        "the control run. "
        "Replace *after* the block has added its part.",
        patched_nie0,
        (
            Case((BLOCKS, _read, CONTROL, TREATED, 0, 2), torch.tensor(0.1226136)),
            Case((BLOCKS, _read, CONTROL, TREATED, 1, 3), torch.tensor(0.0259121)),
        ),
        (
            Mistake(
                "the patch goes in the wrong direction: that is the control's value put into the *treated* run, and with it "
                "the treated run's clean outcome subtracted (NIE1 with its sign turned)",
                lambda b, y, c, t, layer, p: patched_nie0(b, y, t, c, layer, p),
            ),
            Mistake(
                "the position is off by one: the cell to the left of the one asked for was replaced",
                lambda b, y, c, t, layer, p: patched_nie0(b, y, c, t, layer, p - 1),
            ),
            Mistake(
                "the layer is off by one: the stream *before* `blocks[layer]` was replaced, that is, after the block below",
                lambda b, y, c, t, layer, p: (
                    patched_nie0(b, y, c, t, layer - 1, p) if layer else _embedding_patched(b, y, c, t, p)
                ),
            ),
            Mistake(
                "every position was replaced, not one cell: then the whole run is the treated one and the effect is TE",
                lambda b, y, c, t, layer, p: _clean(b, y, t) - _clean(b, y, c),
            ),
            Mistake(
                "nothing changed: was the clean run overwritten together with the patched one (no `.clone()`)?",
                lambda b, y, c, t, layer, p: torch.tensor(0.0),
            ),
            Mistake(
                "the blocks above were not run again on the patched stream: that is a *direct* effect (notebook 03)",
                _later_held,
            ),
            Mistake(
                "only what `blocks[layer]` adds was replaced: the residual stream is the sum, with all that came before",
                _write_patched,
            ),
            Mistake(
                "a block's output is what it *adds*: the residual stream after it is `resid + block(resid)`",
                lambda b, y, c, t, layer, p: patched_nie0([_alone(one) for one in b], y, c, t, layer, p),
            ),
            Mistake(
                "that is NIE1: the control's value in the treated run, taken from the treated run's outcome",
                lambda b, y, c, t, layer, p: -patched_nie0(b, y, t, c, layer, p),
            ),
            Mistake("the sign: patched minus clean", lambda b, y, c, t, layer, p: -patched_nie0(b, y, c, t, layer, p)),
            Mistake(
                "that is y01, the outcome itself: subtract y00, the clean control run's",
                lambda b, y, c, t, layer, p: patched_nie0(b, y, c, t, layer, p) + _clean(b, y, c),
            ),
        ),
    ),
    Exercise(
        "02-2",
        "The proportion mediated",
        1,
        5,
        "Write `share_of_te` for many pairs. If TE is nearly 0 in one pair, what does that pair do to your number?",
        "Divide once, at the very end.",
        share_of_te,
        (
            Case((np.array([1.0, 1.9, 0.35]), np.array([4.0, 2.0, 0.5])), 0.5),
            Case((np.array([3.0, -1.0, 2.0]), np.array([4.0, -1.0, 5.0])), 0.5),
        ),
        (
            Mistake(
                "mean of ratios instead of ratio of means: one pair with a TE near 0 then decides everything",
                lambda nie, te: float((nie / te).mean()),
            ),
            Mistake(
                "absolute values: a pair in which the mediator works against the treatment then counts for it",
                lambda nie, te: float(np.abs(nie).sum() / np.abs(te).sum()),
            ),
            Mistake("the ratio is upside down: NIE over TE", lambda nie, te: float(te.sum() / nie.sum())),
            Mistake("the median of ratios is not the ratio of means", lambda nie, te: float(np.median(nie / te))),
            Mistake(
                "that is the slope of NIE on TE, in which large pairs count twice (used for the untrained twin only)",
                lambda nie, te: float((nie * te).sum() / (te**2).sum()),
            ),
        ),
    ),
    Exercise(
        "02-3",
        "How much of it is late?",
        2,
        8,
        "Write `late_share` (here of one effect a layer). Count only entries above 0, in numerator and denominator.",
        "Six layers: depths 1/12, 3/12, ..., 11/12. Which of them are above 2/3?",
        late_share,
        (
            Case((np.array([1.0, 0.0, 2.0, 1.0, -3.0, 4.0]),), 0.5),
            Case((np.array([1.0, 1.0, 1.0, 1.0, 1.0, 3.0, -1.0]),), 0.375),
            Case((np.array([1.0, 2.0, 5.0]),), 0.625),
        ),
        (
            Mistake(
                "depth is (l + 1/2) / L, the middle of the layer: with l / L the first layers look earlier than they are",
                lambda effect: _share(effect, np.arange(len(effect)) / len(effect)),
            ),
            Mistake(
                "late is the last third of the depth, not the second half",
                lambda effect: _share(effect, (np.arange(len(effect)) + 0.5) / len(effect) + 1 / 6),
            ),
            Mistake(
                "depth is (l + 1/2) / L: with (l + 1) / L a layer that ends in the late third counts as late",
                lambda effect: _share(effect, (np.arange(len(effect)) + 1) / len(effect)),
            ),
            Mistake(
                "negative effects are in the sums: a share of a sum with both signs can be anything", _share_signed
            ),
            Mistake(
                "the negative effects are still in the denominator: late positive ones over *all positive* ones",
                lambda effect: late_share(effect) * float(np.clip(effect, 0, None).sum() / effect.sum()),
            ),
            Mistake(
                "layers were counted, not their effects added",
                lambda effect: late_share((effect > 0).astype(float)),
            ),
            Mistake(
                "negative effects were made positive: C1 asks for the share of the *positive* ones",
                lambda effect: late_share(np.abs(effect)),
            ),
        ),
    ),
)
