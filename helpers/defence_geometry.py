"""The plane of rejection and harmfulness: where prompts lie, and how much steering each of them needs.

Positions are shares: 0 at the mean of the harmful prompts that the model complied with, 1 at the mean of those it refused
(rejection) or of the benign ones it answered (harmfulness).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats as st
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from helpers import defence_outcomes as do
from helpers import defence_stats, steering_fit, steering_methods, steering_positions
from helpers.defence import Lab
from helpers.grid_run import clean_run
from helpers.steering import Edit, Steering
from helpers.steering_fit import Fit

GRID: Final = tuple(np.round(np.arange(0, 2.01, 0.25), 2))  # coefficients tried, in lengths of the direction
BINS: Final = 5
WAYS: Final = {"rejection": "pos_R", "harmfulness": "pos_H"}


@torch.no_grad()
def residuals(lab: Lab, prompts: pd.DataFrame) -> Float[np.ndarray, "prompt layer d"]:
    """The plain model's residual stream after every layer at the last prompt token."""
    found = np.empty((len(prompts), lab.subject.n_layers, lab.subject.d_model), dtype=np.float32)
    for places, ids in do.buckets(lab.subject, list(prompts.text)):
        run = clean_run(lab.subject, ids, keep=("resid",))
        found[places] = torch.stack([h[:, -1] for h in run.resid_post], 1).float().cpu().numpy()
    return found


def positions(directions: steering_fit.Directions, at: Float[np.ndarray, "prompt layer d"], layer: int) -> pd.DataFrame:
    """`pos_R` and `pos_H` of every prompt at a layer."""
    columns = {}
    for one, column in (("refused", "pos_R"), ("benign", "pos_H")):
        ends = [np.asarray(getattr(directions, name)[layer], dtype=float) for name in ("complied", one)]
        columns[column] = steering_positions.position(steering_positions.scale(*ends), at[:, layer])
    return pd.DataFrame(columns)


def separation(lab: Lab, fit: Fit) -> pd.DataFrame:
    """AUROC on validate, by layer: pos_R tells refused from complied harmful prompts, pos_H benign from harmful ones."""
    directions = steering_fit.directions(fit)
    prompts = lab.prompts[lab.prompts.split == "validate"].reset_index(drop=True)
    validate = steering_fit.rows(fit, "validate")  # the fit has read them
    assert list(fit.prompts.text[validate]) == list(prompts.text), "the fit is of another lab"
    at = fit.last["resid_post"][validate]
    harmful = (prompts.kind == "harmful").to_numpy()
    rows = []
    for layer in range(lab.subject.n_layers):
        found = positions(directions, at, layer)
        rejection = roc_auc_score(prompts.refused[harmful], found.pos_R[harmful])
        rows.append((layer, rejection, roc_auc_score(~harmful, found.pos_H)))
    return pd.DataFrame(rows, columns=["layer", "rejection", "harmfulness"])


def decision_layer(separated: pd.DataFrame) -> int:
    """The earliest layer whose worse AUROC is within 0.01 of the best layer's."""
    worse = separated[["rejection", "harmfulness"]].min(axis=1).to_numpy()
    return int(separated.layer[np.flatnonzero(worse >= worse.max() - 0.01)[0]])


def groups(prompts: pd.DataFrame) -> pd.Series:
    """What a prompt is, for the plane: kind, what the plain model did, and how strong its wrapper is."""
    harmful = prompts.kind == "harmful"
    names = [
        ("harmful, unseen wrapper, answered", harmful & (prompts.family == "unseen") & ~prompts.refused),
        ("harmful, strong wrapper, answered", harmful & ~prompts.refused & (prompts.tier > 3)),
        ("harmful, other, answered", harmful & ~prompts.refused),
        ("harmful, wrapped, refused", harmful & prompts.wrapped),
        ("harmful, plain, refused", harmful),
        ("borderline", prompts.kind == "borderline"),
        ("harmless", prompts.kind == "harmless"),
    ]
    return pd.Series(np.select([mask for _, mask in names], [name for name, _ in names], "other"), prompts.index)


def plane(prompts: pd.DataFrame, found: pd.DataFrame, by: pd.Series | None = None) -> pd.DataFrame:
    """Mean position of every group along both directions, with intervals over topics; for the figure.

    `by` names each prompt's group (by default `groups`); prompts of group "" are left out, and groups of one topic.
    """
    rows = []
    named = groups(prompts.reset_index(drop=True)) if by is None else by.to_numpy()
    table = prompts.reset_index(drop=True).assign(**found, group=named).query("group != ''")
    for group, part in table.groupby("group", sort=True):
        if part.topic.nunique() > 1:
            for name, column in WAYS.items():
                change = defence_stats.mean_change(part[column].to_numpy(), part.topic.to_numpy())
                rows.append((group, name, change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=["group", "projection", "estimate", "low", "high"])


def along(directions: steering_fit.Directions, layers: Sequence[int], coefficients: dict[str, float]) -> Steering:
    """Constant steering: so many times each direction at these layers, at all prompt tokens."""

    def edit(layer: int) -> Edit:
        parts = [size * np.asarray(getattr(directions, name)[layer]) for name, size in coefficients.items()]
        return Edit(layer, "resid_post", steering_methods.constant(np.sum(parts, axis=0)), blind=True)

    return Steering("constant", tuple(edit(layer) for layer in layers))


def odds_over(
    lab: Lab, directions: steering_fit.Directions, layers: Sequence[int], prompts: pd.DataFrame, name: str,
    held: dict[str, float] | None = None,
) -> Float[np.ndarray, "coefficient prompt"]:  # fmt: skip
    """Log-odds of not refusing under each coefficient of `GRID` along one direction, the `held` ones constant."""
    steered = [along(directions, layers, {**(held or {}), name: float(size)}) for size in GRID]
    found = do.log_odds_each(lab.subject, prompts.text, lab.openers, steered)
    return np.stack([-logit(one.p_refuse.to_numpy()) for one in found])


def needed(odds: Float[np.ndarray, "coefficient prompt"]) -> Float[np.ndarray, "prompt"]:
    """The smallest coefficient that makes the model refuse, between grid points by a straight line; NaN where none does.

    >>> needed(np.array([[1.0], [-3.0], [1.0]] + [[1.0]] * 6)).tolist()
    [0.0625]
    """
    refused = odds < 0
    first = refused.argmax(0)
    column = np.arange(odds.shape[1])
    before = np.maximum(first - 1, 0)
    low, high = odds[before, column], odds[first, column]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(first == 0, 0.0, low / (low - high))
    grid = np.array(GRID)
    return np.where(refused.any(0), grid[before] + share * (grid[first] - grid[before]), np.nan)


def tolerated(odds: Float[np.ndarray, "coefficient prompt"], answered: np.ndarray) -> Float[np.ndarray, "prompt"]:
    """The largest coefficient of the grid with which a prompt is treated right: answered or refused, as it should be."""
    right = np.where(answered, odds >= 0, odds < 0)
    return np.where(right.any(0), np.array(GRID)[len(GRID) - 1 - right[::-1].argmax(0)], np.nan)


def law(position: np.ndarray, coefficient: np.ndarray, topic: np.ndarray, panel: str, group: str) -> pd.DataFrame:
    """Mean coefficient over fifths of the position, with intervals over topics; prompts without one are left out."""
    table = pd.DataFrame({"position": position, "y": coefficient, "topic": topic}).dropna()
    rows = []
    if len(table) >= 2 * BINS:
        fifth = pd.qcut(table.position, BINS, labels=False, duplicates="drop")
        for _, part in table.groupby(fifth):
            if part.topic.nunique() > 1:
                change = defence_stats.mean_change(part.y.to_numpy(), part.topic.to_numpy())
                rows.append((panel, group, float(part.position.mean()), change.estimate, change.low, change.high))
    return pd.DataFrame(rows, columns=["panel", "group", "x", "estimate", "low", "high"])


def trend(position: np.ndarray, coefficient: np.ndarray) -> float:
    """Spearman's rank correlation of position and coefficient over the prompts that have one."""
    known = np.isfinite(coefficient)
    return float(st.spearmanr(position[known], coefficient[known]).statistic)
