"""Exercises of notebook 05: a group of tokens, who carries the signal on, prompts of unequal length."""

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


def meeting_places(source: list[str], base: list[str]) -> dict[str, tuple[int, int]]:
    """For prompts of unequal length: group -> (position in source, position in base) of the group's *last* token.

    Both lists name each position's group; groups that only one prompt has are left out.
    """
    last_source = {group: place for place, group in enumerate(source)}
    last_base = {group: place for place, group in enumerate(base)}
    return {group: (last_source[group], last_base[group]) for group in last_source if group in last_base}


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


def _first_tokens(source: list[str], base: list[str]) -> dict[str, tuple[int, int]]:
    return {group: (source.index(group), base.index(group)) for group in dict.fromkeys(source) if group in base}


GROUPS = ["header", "wrapper", "wrapper", "verb", "last"]
CONTROL, TREATED = torch.arange(10.0).reshape(5, 2), torch.arange(10.0).reshape(5, 2) + 100
PATCHED = torch.tensor([[0.0, 1.0], [102.0, 103.0], [104.0, 105.0], [6.0, 7.0], [8.0, 9.0]])
LIVE, FROZEN, FULL, BASE = map(np.array, ([1.0, 3.0], [0.0, 1.0], [3.5, 4.5], [-0.5, 2.5]))
LONG = ["header", "wrapper", "wrapper", "wrapper", "verb", "object", "last"]
SHORT = ["header", "wrapper", "verb", "verb", "last"]


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
    Exercise(
        "05-3",
        "Prompts of unequal length",
        2,
        10,
        "Write `meeting_places`: for each group that both prompts have, which token of the source prompt may be put in place of "
        "which token of the base prompt?",
        "A dictionary keeps the last value that was written under a key; make one for each prompt.",
        meeting_places,
        (Case((LONG, SHORT), {"header": (0, 0), "wrapper": (3, 1), "verb": (4, 3), "last": (6, 4)}),),
        (
            Mistake(
                "the first token of each group: information gathers at the last one, which alone has seen the whole group",
                _first_tokens,
            ),
            Mistake(
                "the same position in both prompts: after the first group of unequal length these are different places",
                lambda s, b: {g: (p, p) for g, (p, _) in meeting_places(s, b).items()},
            ),
            Mistake(
                "source and base are exchanged: the first position is the one that is *read*",
                lambda s, b: {g: (q, p) for g, (p, q) in meeting_places(s, b).items()},
            ),
            Mistake(
                "the prompts were read side by side: they differ in length, so look each group up in each prompt by itself",
                lambda s, b: {g: (i, i) for i, (g, h) in enumerate(zip(s, b, strict=False)) if g == h},
            ),
            Mistake(
                "off by one: positions are counted from 0",
                lambda s, b: {g: (p + 1, q + 1) for g, (p, q) in meeting_places(s, b).items()},
            ),
        ),
    ),
)
