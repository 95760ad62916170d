"""The light cone: which cells (layer, position) a difference can have reached, by architecture alone.

A layer lets a position read the positions its attention mask shows it, and no others. With sliding windows a difference
needs several layers to reach the last token, whatever was learned: late effects are then late by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from companion.model.activations import CleanRun
from companion.prompts.tokens import TokenPair


def visible_keys(run: CleanRun) -> list[Bool[np.ndarray, "query key"]]:
    """For each layer, which keys its attention mask shows each query of the first pair, read off the library's own call."""
    n_pos = run.tokens.shape[1]
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
    shown = []
    for call in run.calls:
        mask = call.get("attention_mask")
        if mask is None:
            shown.append(causal.numpy())
            continue
        # Boolean masks say what is seen; additive ones hold 0 there and a large negative number elsewhere.
        own = mask[0, 0, :, :n_pos].cpu()
        shown.append(((own if own.dtype == torch.bool else own == 0) & causal).numpy())
    return shown


def reached(
    visible: Sequence[Bool[np.ndarray, "query key"]], differ: Bool[np.ndarray, "pos"]
) -> Bool[np.ndarray, "layer pos"]:
    """Which positions' residual stream may differ after each layer, given where the tokens differ.

    >>> window = np.tril(np.ones((4, 4), bool)) & ~np.tril(np.ones((4, 4), bool), -2)
    >>> reached([window, window], np.array([True, False, False, False])).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0]])
    """
    rows, now = [], differ
    for mask in visible:
        now = now | (mask & now[None, :]).any(axis=1)
        rows.append(now)
    return np.stack(rows)


def earliest_layers(run: CleanRun, pairs: Sequence[TokenPair]) -> list[int]:
    """For each pair of a batch the first layer whose output at the last token can differ at all.

    It is -1 where the last token itself differs, and the number of layers where no layer's output can differ.
    """
    visible, found = visible_keys(run), []
    for pair in pairs:
        differ = pair.control != pair.treated
        arrived = np.flatnonzero(reached(visible, differ)[:, -1])
        found.append(-1 if differ[-1] else int(arrived[0]) if len(arrived) else len(visible))
    return found


def recomputed_cells(n_layers: int, tokens: Sequence[str], corners: Mapping[str, tuple[int, int]]) -> pd.DataFrame:
    """The grid of cells for some interventions, for a drawing: panel, layer, position, state, token.

    `corners` maps a panel's title to the patched (layer, position). Cells above and to the right are recomputed, the
    last one is read, all others stay as the clean run left them.
    """
    rows = []
    for panel, (layer, position) in corners.items():
        for at_layer, at_position in np.ndindex(n_layers, len(tokens)):
            state = "recomputed" if at_layer > layer and at_position >= position else "clean"
            state = "patched" if (at_layer, at_position) == (layer, position) else state
            state = "read" if (at_layer, at_position) == (n_layers - 1, len(tokens) - 1) else state
            rows.append((panel, at_layer, at_position, state, tokens[at_position]))
    return pd.DataFrame(rows, columns=["panel", "layer", "position", "state", "token"])
