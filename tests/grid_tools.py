"""Runs, masks and patches with which the grid is tried, and its largest deviation from full forward passes."""

import torch
from families import tokens
from torch import Tensor

from companion.model import activations, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch

N_POS = 9
SITES = [("resid_post", None), ("attn_out", None), ("mlp_out", None), ("head", 1), ("head", (0, 3)), ("neuron", 7),
         ("neuron", (3, 40))]  # fmt: skip
COLUMNS = {"first": [0], "middle": [4], "last": [8], "group": [3, 5], "from 2 on": [2, 3, 4, 5, 6, 7, 8]}


def mask(columns: list[int], n_pairs: int = 3, n_pos: int = N_POS) -> Tensor:
    """True in these columns of every pair."""
    made = torch.zeros(n_pairs, n_pos, dtype=torch.bool)
    made[:, columns] = True
    return made


def diagonal() -> Tensor:
    """Another position in every pair."""
    return torch.eye(N_POS, dtype=torch.bool)[[3, 5, 8]]


def every_patch(layers: tuple[int, ...] = (0, 1, 3)) -> list[Patch]:
    """All sites, at all kinds of positions."""
    masks = [mask(columns) for columns in COLUMNS.values()] + [diagonal()]
    return [Patch(site, layer, where, index) for layer in layers for where in masks for site, index in SITES]


def runs(subject: Subject) -> tuple[CleanRun, CleanRun]:
    """Clean runs over two batches whose first two tokens are the same."""
    control, treated = tokens(seed=1), tokens(seed=2)
    treated[:, :2] = control[:, :2]
    return activations.clean_run(subject, control), activations.clean_run(subject, treated)


def worst(subject: Subject, pair: tuple[CleanRun, CleanRun], patches: list, read: tuple[int, ...] = (-1,)) -> float:
    """The largest deviation from one full forward pass per intervention, as a share of the largest effect."""
    fast = replay.interchange(subject, *pair, patches, read=read)
    plain = replay.interchange_full_forward(subject, *pair, patches, read=read)
    effect = plain - replay.interchange(subject, *pair, [Patch("mlp_out", 0, mask([]))], read=read)
    assert float(effect.abs().max()) > 0.1
    return float((fast - plain).abs().max() / effect.abs().max())
