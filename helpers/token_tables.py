"""The tables behind the figures of the token notebook."""

from __future__ import annotations

import numpy as np
import pandas as pd

from helpers import evidence, light_cone, mediation, positions, summary, token_effects
from helpers.study import Study
from helpers.tokens import TokenPair

PLACES = {
    "last": "last token",
    "others": "all other tokens",
    "last_instruction": "last instruction token",
    "request": "verb and object",
}


def earliest_by_token(study: Study, pair: TokenPair) -> np.ndarray:
    """For each token the first layer whose residual stream there can differ at all; the number of layers where none can."""
    run = mediation.run_clean(study.subject, [pair]).control
    reached = light_cone.reached(light_cone.visible_keys(run), pair.control != pair.treated)
    return np.where(reached.any(0), reached.argmax(0), study.subject.n_layers)


def earliest_by_group(study: Study, treatment: str) -> dict[str, int]:
    """The first layer at which a group can differ in any pair of a treatment."""
    header = positions.user_header(study.subject.tokenizer)
    found: dict[str, int] = {}
    for group in mediation.batches(study.of(treatment.removesuffix("-T2b")), study.subject):
        run = mediation.run_clean(study.subject, group[:1]).control
        visible = light_cone.visible_keys(run)
        for pair in group:
            reached = light_cone.reached(visible, pair.control != pair.treated)
            for name, mask in positions.groups(pair, header).items():
                at = np.flatnonzero(reached[:, mask].any(1))
                layer = int(at[0]) if len(at) else study.subject.n_layers
                found[name] = min(found.get(name, layer), layer)
    return found


def one_pair(study: Study, pair: TokenPair) -> pd.DataFrame:
    """Effect of every single token's residual stream: layer, position, token, earliest, nie; signed by the pair's own TE."""
    table = token_effects.position_map(study, pair)
    last = table[(table.position == table.position.max()) & (table.layer == table.layer.max())]
    nie = np.sign(last.nie0.item()) * (table.nie0 + table.nie1) / 2
    earliest = earliest_by_token(study, pair)
    made = table.assign(nie=nie, earliest=table.position.map(dict(enumerate(earliest))).astype(float))
    return made[["layer", "position", "token", "earliest", "nie"]]


def by_group(study: Study, table: pd.DataFrame, treatment: str, names: list[str]) -> pd.DataFrame:
    """Mean effects on test of every site, group and layer: treatment, site, group, earliest, layer, estimate, low, high."""
    means = token_effects.summarise(table, treatment)
    means = means[(means.direction == "mean") & means.position.isin(names)]
    order = {name: i for i, name in enumerate(names)}
    means = means.assign(group=means.position, treatment=treatment).sort_values("position", key=lambda p: p.map(order))
    earliest = earliest_by_group(study, treatment)
    means = means.assign(earliest=means.position.map(earliest).astype(float))
    return means[["treatment", "site", "group", "earliest", "layer", "estimate", "low", "high"]]


def by_direction(table: pd.DataFrame, treatment: str, names: list[str]) -> pd.DataFrame:
    """The residual stream's mean effects on test, one block of rows for sufficiency (NIE0) and one for necessity (NIE1).

    Rows are direction and group, columns layers. Where no pair of the treatment has a group, its row is left out.
    """
    means = token_effects.summarise(table, treatment).query("site == 'resid_post'")
    wide = means.pivot(index=["direction", "position"], columns="layer", values="estimate")
    rows = [(way, name) for way in ("sufficiency", "necessity") for name in names if (way, name) in wide.index]
    return wide.loc[rows].rename_axis(index=["direction", "group"])


def hand_over_curves(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Share of TE in the residual stream of some places by layer, on test: treatment, where, layer, estimate, low, high."""
    part = table[(table.treatment == treatment) & (table.site == "resid_post") & (table.outcome == "Y1")]
    test = evidence.signed(part[part.position.isin(PLACES)]).query("split == 'test'")
    made = summary.share_of_te(test, by=["position", "layer"])
    return made.assign(treatment=treatment, where=made.position.map(PLACES))[
        ["treatment", "where", "layer", "estimate", "low", "high"]
    ]
