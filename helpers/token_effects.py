"""Mediation by token: position groups and single positions at every layer.

Traps that the tests hold: the residual stream of all positions together carries TE at every layer, and in the last layer
every position but the last carries nothing. Neither says anything about the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from helpers import evidence, grid, mediation, positions, relatives, summary
from helpers.grid import Patch
from helpers.mediation import Mediator
from helpers.study import Study, with_difference
from helpers.tokens import TokenPair

SITES = ("resid_post", "attn_out", "mlp_out")
TREATMENTS = ("T1", "T2", "T2b")
PAIRS = 80


def groups(study: Study) -> tuple[list[str], list[str]]:
    """Position groups that some pair of the generation and recognition treatments has, in reading order; and those none has.

    The span of the request (verb and object), the differing tokens and all tokens come last: they overlap the others.
    The first generated tokens are no group: Y1 is decided before them, so that their effect on it is 0 by construction.
    """
    header = positions.user_header(study.subject.tokenizer)
    first: dict[str, list[float]] = {}
    every: set[str] = set()
    for pair in study.of(*TREATMENTS) or study.pairs:
        masks = positions.groups(pair, header)
        every |= set(masks)
        for name in positions.present(masks):
            first.setdefault(name, []).append(float(np.flatnonzero(masks[name]).mean() / len(pair.control)))
    found = sorted(first, key=lambda name: float(np.mean(first[name])))
    spans = ["request"] if {"verb", "object"} & set(found) else []
    missing = sorted(every - set(found) - set(positions.OVERLAPPING))
    return [*found, *spans, "differ", "others", "all"], missing


def wanted(study: Study) -> list[Mediator]:
    """Residual stream, attention and MLP output of every layer at every group; groups that overlap: residual only."""
    names, _ = groups(study)
    apart = [name for name in names if name not in positions.OVERLAPPING]
    overlapping = [name for name in names if name in positions.OVERLAPPING]
    return [
        *mediation.mediators(study.subject, SITES, apart),
        *mediation.mediators(study.subject, SITES[:1], overlapping),
    ]


def effects(study: Study, treatments: Sequence[str] = TREATMENTS) -> pd.DataFrame:
    """Group by layer effects (Y1) in both directions for T1, T2, T2b and T2 - T2b, on at most 80 pairs a treatment."""
    study = relatives.thinned(study, PAIRS)
    return with_difference(
        mediation.effects(study.subject, study.of(*treatments), study.openers, wanted(study)), study.twins
    )


def summarise(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Mean signed effects on test by site, group and layer: direction, site, position, layer, estimate, low, high."""
    part = table[(table.treatment == treatment) & (table.outcome == "Y1")]
    test = evidence.signed(part).query("split == 'test'")
    names = {"nie0": "sufficiency", "nie1": "necessity", "nie": "mean"}
    by = ["site", "position", "layer"]
    made = [summary.cell_means(test, value, by).assign(direction=name) for value, name in names.items()]
    return pd.concat(made, ignore_index=True)[["direction", *by, "estimate", "low", "high"]]


def position_map(study: Study, pair: TokenPair, site: str = "resid_post") -> pd.DataFrame:
    """One pair, every single position and layer: layer, position, token, group, nie0, nie1 (log-odds, not signed)."""
    subject, n_pos = study.subject, len(pair.control)
    batch = mediation.run_clean(subject, [pair])
    places = [(layer, position) for layer in range(subject.n_layers) for position in range(n_pos)]
    eye = torch.eye(n_pos, dtype=torch.bool, device=batch.control.tokens.device)
    patches = [Patch(site, layer, eye[[position]]) for layer, position in places]
    patched = tuple(
        grid.interchange(subject, base, source, patches)[:, :, 0]
        for base, source in ((batch.control, batch.treated), (batch.treated, batch.control))
    )
    scored = mediation.score(subject, batch, (patched[0], patched[1]), study.openers[pair.pair.treatment], "Y1")
    made = mediation.estimands(pd.DataFrame({name: values[0] for name, values in scored.items()}))
    table = pd.DataFrame(places, columns=["layer", "position"]).assign(nie0=made.nie0, nie1=made.nie1)
    text = [positions.token_labels(pair, side, subject.tokenizer) for side in ("control", "treated")]
    tokens = [a if a == b else f"{a}/{b}" for a, b in zip(*text, strict=True)]
    masks = positions.groups(pair, positions.user_header(subject.tokenizer))
    group = {int(at): name for name in positions.present(masks) for at in np.flatnonzero(masks[name])}
    return table.assign(token=table.position.map(dict(enumerate(tokens))), group=table.position.map(group))
