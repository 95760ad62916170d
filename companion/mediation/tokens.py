"""Mediation by token: the share of the total effect in the residual stream of groups of tokens, and of single tokens.

Where a difference can have arrived at all follows from the attention masks: with sliding windows it needs several layers to
reach the last token, whatever was learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from companion.mediation import estimands, summaries
from companion.mediation.study import Study
from companion.model import activations, replay
from companion.model.activations import CleanRun
from companion.model.interventions import Patch, position_mask
from companion.prompts import positions
from companion.prompts.tokens import TokenPair

SITES = ("resid_post", "attn_out", "mlp_out")
TREATMENTS = ("T1", "T2", "T2b")
PAIRS = 80  # a treatment


def position_groups(study: Study) -> list[str]:
    """Position groups that some pair of the generation and recognition treatments has, in reading order; none overlap."""
    header = positions.user_header(study.subject.tokenizer)
    places: dict[str, list[float]] = {}
    for pair in study.of(*TREATMENTS) or study.pairs:
        masks = positions.groups(pair, header)
        for name in positions.present(masks):
            places.setdefault(name, []).append(float(np.flatnonzero(masks[name]).mean() / len(pair.control)))
    return sorted(places, key=lambda name: float(np.mean(places[name])))


# ---- where a difference can have arrived ----


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


def arrival_layers(run: CleanRun, pair: TokenPair) -> Int[np.ndarray, "pos"]:
    """For each position the first layer after which a pair can differ there; the number of layers where none can."""
    layers = reached(activations.visible_keys(run), pair.control != pair.treated)
    return np.where(layers.any(0), layers.argmax(0), len(layers))


def earliest_layers(run: CleanRun, pairs: Sequence[TokenPair]) -> list[int]:
    """For each pair the first layer whose output at the last token can differ: -1 if the token does, `n_layers` if none."""
    return [-1 if one.control[-1] != one.treated[-1] else int(arrival_layers(run, one)[-1]) for one in pairs]


# ---- effects of groups and of single tokens ----


def token_effects(study: Study, treatments: Sequence[str] = ()) -> pd.DataFrame:
    """Effects (Y1) of every group's residual stream in both directions, with T2 - T2b behind them, on test pairs.

    Of T1, T2 and T2b unless `treatments` says otherwise, and of the first treatment of a set without these. At most 80 pairs a
    treatment, and fewer pairs and layers where each is costly. A pair of another split, which only gives TE its sign, has one
    row. Columns of `estimands.tidy`, in log-odds; `position` is the group.
    """
    treatments = treatments or [name for name in TREATMENTS if study.of(name)] or study.treatments[:1]
    study, tables = study.thinned(PAIRS), []
    groups = estimands.mediators(study.subject, SITES[:1], position_groups(study), _mapped_layers(study))
    for treatment in treatments:
        for is_test, some in ((True, groups), (False, [estimands.Mediator(SITES[0], 0)])):
            part = [pair for pair in study.of(treatment) if (pair.pair.split == "test") is is_test]
            tables += [estimands.measure_effects(study.subject, part, study.openers, some)] if part else []
    return estimands.with_difference(pd.concat(tables, ignore_index=True), study.twins)


def _mapped_layers(study: Study) -> list[int]:
    """The layers of a map over tokens: the first one, which tells what was read, and `Study.thinned_layers`."""
    return sorted({0, *study.thinned_layers})


def group_shares(study: Study, table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Share of TE in each group's residual stream on test: treatment, group, earliest, layer, estimate, low, high.

    The mean of both directions. Groups stand in reading order, and those before the first token that differs, which carry
    exactly 0, are left out; `earliest` is the first layer at which a group can differ.
    """
    earliest = earliest_by_group(study, treatment)
    names = [name for name in position_groups(study) if earliest.get(name, np.inf) < study.subject.n_layers]
    part = summaries.signed(table[(table.treatment == treatment) & (table.outcome == "Y1")])
    part = part[(part.split == "test") & part.position.isin(names)]
    made = summaries.share_of_te(part, by=["position", "layer"]).rename(columns={"position": "group"})
    made = made.sort_values(["group", "layer"], key=lambda x: x.map(names.index) if x.name == "group" else x)
    made = made.assign(treatment=treatment, earliest=made.group.map(earliest).astype(float))
    return made[["treatment", "group", "earliest", "layer", "estimate", "low", "high"]]


def earliest_by_group(study: Study, treatment: str) -> dict[str, int]:
    """The first layer at which a group can differ in any pair of a treatment; the number of layers where none can."""
    header = positions.user_header(study.subject.tokenizer)
    found: dict[str, int] = {}
    for group in estimands.batches(study.of(treatment.removesuffix("-T2b")), study.subject):
        run = estimands.run_clean(study.subject, group[:1]).control
        for pair in group:
            layers = arrival_layers(run, pair)
            for name, mask in positions.groups(pair, header).items():
                found[name] = int(layers[mask].min(initial=found.get(name, study.subject.n_layers)))
    return found


def position_effects(study: Study, pair: TokenPair, sites: Sequence[str] = SITES) -> pd.DataFrame:
    """Share of one pair's TE at every token, layer and site, mean of both directions.

    Columns: site, layer, position, token, earliest, share. Tokens before the first that differs, which carry exactly 0, are
    left out; `earliest` is the first layer at which a token can differ. Layers are those of `token_effects`.
    """
    subject, batch = study.subject, estimands.run_clean(study.subject, [pair])
    tokens, arrives = batch.control.tokens, arrival_layers(batch.control, pair)
    behind = np.flatnonzero(arrives < subject.n_layers)
    places = [(site, layer, int(at)) for site in sites for layer in _mapped_layers(study) for at in behind]
    patches = [Patch(site, layer, position_mask(tokens, at)) for site, layer, at in places]
    runs = (batch.control, batch.treated)
    into, out = (replay.interchange(subject, *both, patches)[:, :, 0] for both in (runs, runs[::-1]))
    cells = estimands.score_cells(subject, batch, (into, out), study.openers[pair.pair.treatment])
    made = estimands.with_estimands(pd.DataFrame({name: np.resize(y[0], len(places)) for name, y in cells.items()}))
    text = [positions.token_labels(pair, side, subject.tokenizer) for side in ("control", "treated")]
    shown = {i: a if a == b else f"{a}/{b}" for i, (a, b) in enumerate(zip(*text, strict=True))}
    table = pd.DataFrame(places, columns=["site", "layer", "position"])
    earliest = arrives[table.position].astype(float)
    return table.assign(token=table.position.map(shown), earliest=earliest, share=(made.nie0 + made.nie1) / 2 / made.te)
