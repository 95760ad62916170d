"""Exercises of notebook 05: a group of tokens, and who carries the signal on."""

import numpy as np
import torch

from exercises.judging import Case, Exercise, Mistake


def patch_group(control: torch.Tensor, treated: torch.Tensor, groups: list[str], name: str) -> torch.Tensor:
    """The control run's residual stream (position, width) with the tokens of one group set to their treated values.

    `groups` names the group of each position.
    """
    inside = torch.tensor([group == name for group in groups])
    return torch.where(inside[:, None], treated, control)


def carried_by_mlps(
    attention_held: np.ndarray, both_held: np.ndarray, nothing_held: np.ndarray, base: np.ndarray
) -> float:
    """Share of the MLPs above the hand-over, over pairs of shape (pair,); all four are outcomes.

    The hand-over residual stream is patched in the first three; above it attention is held at the control run's values, or both
    attention and MLPs, or nothing. In `base` nothing is patched.
    """
    return float((attention_held - both_held).sum() / (nothing_held - base).sum())


def _last_only(control: torch.Tensor, treated: torch.Tensor, groups: list[str], name: str) -> torch.Tensor:
    patched = control.clone()
    place = len(groups) - 1 - groups[::-1].index(name)
    patched[place] = treated[place]
    return patched


def _first_only(control: torch.Tensor, treated: torch.Tensor, groups: list[str], name: str) -> torch.Tensor:
    patched = control.clone()
    patched[groups.index(name)] = treated[groups.index(name)]
    return patched


def _shifted(control: torch.Tensor, treated: torch.Tensor, groups: list[str], name: str) -> torch.Tensor:
    return patch_group(control, treated, [*groups[1:], ""], name)


GROUPS = ["header", "wrapper", "wrapper", "verb", "last"]
CONTROL, TREATED = torch.arange(10.0).reshape(5, 2), torch.arange(10.0).reshape(5, 2) + 100
PATCHED = torch.tensor([[0.0, 1.0], [102.0, 103.0], [104.0, 105.0], [6.0, 7.0], [8.0, 9.0]])
LIVE, FROZEN, FULL, BASE = map(np.array, ([1.0, 3.0], [0.0, 1.0], [3.5, 4.5], [-0.5, 2.5]))


EXERCISES = (
    Exercise(
        "05-1",
        "One group of tokens",
        1,
        5,
        "Write `patch_group`: put one group's tokens of the treated run into the control run.",
        "A mask over positions, `[group == name for group in groups]`, broadcast over the width, and `torch.where`.",
        patch_group,
        (Case((CONTROL, TREATED, GROUPS, "wrapper"), PATCHED),),
        (
            Mistake(
                "the wrong direction, or the complement of the group: the group's *control* values in the *treated* run",
                lambda c, t, g, n: patch_group(t, c, g, n),
            ),
            Mistake("that is the whole treated run: only the group's tokens were asked for", lambda c, t, g, n: t),
            Mistake("only the group's last token was patched: a group can have several", _last_only),
            Mistake("only the group's first token was patched: a group can have several", _first_only),
            Mistake("positions are off by one: the patch begins one token too early", _shifted),
        ),
    ),
    Exercise(
        "05-2",
        "What do MLPs carry on?",
        2,
        10,
        "Write `carried_by_mlps`: what is lost when MLPs are held on top of attention, as a share of the whole effect. "
        "Given are the outcomes of four runs, for one direction: attention held, both held, nothing held, nothing patched.",
        "One difference above the line, another below it, each summed over pairs before you divide.",
        carried_by_mlps,
        (Case((LIVE, FROZEN, FULL, BASE), 0.5),),
        (
            Mistake(
                "mean of ratios instead of ratio of means: sum over pairs first, divide once",
                lambda live, f, p, b: float(((live - f) / (p - b)).mean()),
            ),
            Mistake(
                "the skip path is counted as the MLPs': subtract the run with MLPs *frozen*, not the base run",
                lambda live, f, p, b: float((live - b).sum() / (p - b).sum()),
            ),
            Mistake(
                "the denominator is an outcome, not an effect: subtract the base run",
                lambda live, f, p, b: float((live - f).sum() / p.sum()),
            ),
            Mistake(
                "the denominator is the effect with attention held: the share is of the whole effect, nothing held",
                lambda live, f, p, b: float((live - f).sum() / (live - b).sum()),
            ),
            Mistake(
                "that is the other order: what is lost when MLPs are held while all else is live",
                lambda live, f, p, b: float((p - f).sum() / (p - b).sum()),
            ),
        ),
    ),
)
