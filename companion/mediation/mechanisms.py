"""How an indirect effect comes about: which component computes the decision, what carries it on, and which tokens hold it.

Computed (C1). A head that only copies what an earlier layer decided has indirect and direct effects, too. For the four prompts
(harmless or harmful request) x (neutral or jailbreak wrapper), the input that a component f *would* get if everything before
it were additive is h10 + h01 - h00, and what f computes from it beyond the sum of its outputs is

    G = f(h10 + h01 - h00) - f(h10) - f(h01) + f(h00)

A linear copy has G = 0, whatever it copies. The effect of G is measured as any other: taken away from the jailbroken
harmful run, or added to the neutral harmful one, at all positions from the first that differs, with everything above live.

Carried (C4). The residual stream at the last token is set to the other run's value after one layer. Above it, at the last
token, attention outputs and MLP outputs either react or are held at the base run's values; comparing the ways says which
of them the signal needs on its way.

Held by tokens. The share of TE in the residual stream of groups of tokens, and of single ones. Where a difference can have
arrived at all follows from the attention masks: with sliding windows that takes several layers, whatever was learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import NotDefined, progress
from companion.base.thresholds import COMPONENTS
from companion.mediation import estimands, outcomes, summaries
from companion.mediation.estimands import Batch, Mediator
from companion.mediation.study import Study
from companion.model import activations, memory, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch, component_output, position_mask
from companion.prompts import positions
from companion.prompts.tokens import TokenPair
from companion.stats import clusters
from companion.stats.bootstrap import Quantity, interval

# Of `summaries.VARIANTS` those that the carried and the computed signal have.
CARRIED_VARIANTS = tuple(one for one in summaries.VARIANTS if one.name != "full response")
COMPUTED_VARIANTS = tuple(one for one in CARRIED_VARIANTS if one.name != "norm frozen")
SIGNS = {"10": 1, "01": 1, "00": -1}  # first digit: harmful request, second: jailbreak wrapper
# Which outputs above the patched layer are held at the base run's values, by the name that the effect table calls it.
HELD: dict[str, tuple[str, ...]] = {
    "live": (), "attention held": ("attn_out",), "MLPs held": ("mlp_out",), "both held": ("attn_out", "mlp_out"),
    "all held": ("attn_out", "mlp_out"),  # and the MLP output of the patched layer itself
}  # fmt: skip
# Weights of the effects in each path. MLPs, attention and skip add up to the whole effect.
PATHS = {
    "MLPs": {"attention held": 1, "both held": -1},
    "attention": {"live": 1, "attention held": -1},
    "skip": {"both held": 1},
    "MLPs, attention live": {"live": 1, "MLPs held": -1},
}
# The same with the patched layer's own MLP among the MLPs; it reads what attention brought in that layer.
WITH_OWN = {"MLPs from this layer on": {"attention held": 1, "all held": -1}}
LEAST = 0.1  # share of TE at the last token from which its paths are drawn
SITES = ("resid_post", "attn_out", "mlp_out")  # of a map over single tokens
TREATMENTS, PAIRS = ("T1", "T2", "T2b"), 80  # whose groups of tokens are measured, and on how many pairs of each


# ---- what is computed ----


def interaction_output(
    subject: Subject, runs: Mapping[str, CleanRun], site: str, layer: int
) -> Float[Tensor, "pair pos d"]:
    """G of one component, from the clean runs of the four prompts ("11", "10", "01", "00")."""
    ahead = {name: run.resid_pre[layer] for name, run in runs.items()}
    if site == "mlp_out":
        ahead = {name: h + runs[name].attn_out[layer] for name, h in ahead.items()}
    additive = sum((sign * ahead[name] for name, sign in SIGNS.items()), torch.zeros_like(ahead["00"]))
    summed = sum((sign * runs[name].site(site, layer) for name, sign in SIGNS.items()), torch.zeros_like(additive))
    return component_output(subject, runs["11"], site, layer, additive) - summed


def interaction_effects(study: Study) -> pd.DataFrame:
    """Effect of what each component computes, as `estimands.measure_effects` has it: treatment T2-T2b, outcome Y1.

    `nie1` is what the jailbroken harmful run loses without it, `nie0` what the neutral harmful run gains by it; TE is that
    of T2 - T2b. No rows where no twins have prompts of one length.
    """
    subject, tables = study.subject, []
    twins = {pair.pair.id: (pair, twin) for pair, twin in study.with_twins(study.judged.of("T2"))}
    for pairs in progress(estimands.batches([pair for pair, _ in twins.values()], subject, runs=4), desc="computed"):
        both = pairs, [twins[one.pair.id][1] for one in pairs]
        harmful, harmless = (estimands.run_clean(subject, *order) for order in (both, both[::-1]))
        runs = {"10": harmful.control, "11": harmful.treated, "00": harmless.control, "01": harmless.treated}
        wanted = [Mediator(site, layer, "all") for site in COMPONENTS for layer in range(subject.n_layers)]
        more = [interaction_output(subject, runs, one.site, one.layer) for one in wanted]
        # Before the first token that differs all four runs compute the same: G is 0 there.
        differs = torch.stack([run.tokens != harmful.control.tokens for run in runs.values()])
        behind = differs.any(0).cummax(1).values
        odds, patched = {}, []
        for name, run in runs.items():
            openers = study.openers["T2" if name[0] == "1" else "T2b"]
            odds[name] = to_host(outcomes.log_odds(subject, run.resid_post[-1][:, -1:], openers))
        for base, sign in ((harmful.control, 1), (harmful.treated, -1)):
            values = (base.site(one.site, one.layer) + sign * extra for one, extra in zip(wanted, more, strict=True))
            patches = [Patch(one.site, one.layer, behind, value=new) for one, new in zip(wanted, values, strict=True)]
            resid = replay.interchange(subject, base, base, patches)[:, :, 0]
            patched.append(to_host(outcomes.log_odds(subject, resid, study.openers["T2"])))
        # y11 - y00 is TE of T2 - T2b, and y00 that of the harmful run.
        y11 = odds["11"] - odds["01"] + odds["00"]
        cells = {"y00": odds["10"], "y01": patched[0], "y10": y11 - (odds["11"] - patched[1]), "y11": y11}
        tables.append(estimands.tidy(pairs, wanted, "Y1", cells).assign(treatment="T2-T2b"))
    return estimands.with_estimands(pd.concat(tables, ignore_index=True)) if tables else pd.DataFrame()


# ---- what carries it on ----


def held_patches(subject: Subject, base: CleanRun, layers: Sequence[int]) -> list[tuple[Patch, ...]]:
    """For each layer the interventions after which something above reacts: the source's residual stream, and what is held."""
    last, made = position_mask(base.tokens, -1), []
    for layer, sites in itertools.product(layers, (some for some in HELD.values() if len(some) < 2)):
        above = [(site, at) for site in sites for at in range(layer + 1, subject.n_layers)]
        held = (Patch(site, at, last, value=base.site(site, at)) for site, at in above)
        made.append((Patch("resid_post", layer, last), *held))
    return made


def held_residuals(
    subject: Subject, batch: Batch, layers: Sequence[int]
) -> tuple[Float[Tensor, "pair way d"], Float[Tensor, "pair way d"]]:
    """Final residual stream at the last token for the cells 01 and 10; ways are layers times `HELD`."""
    runs = batch.control, batch.treated
    last, at_once = position_mask(runs[0].tokens, -1), memory.pairs_at_once(subject, runs[0].tokens.shape[1])
    into = (held_patches(subject, base, layers) for base in runs)
    both, ways = replay.both_ways(subject, *runs, *into, at_once=at_once), []
    for swept, (base, source) in zip(both, (runs, runs[::-1]), strict=True):
        skips = []  # where both are held nothing above reacts: effects are direct ones
        for layer in layers:
            own_mlp_held = source.resid_post[layer] - source.site("mlp_out", layer) + base.site("mlp_out", layer)
            skips += [Patch("resid_post", layer, last), Patch("resid_post", layer, last, value=own_mlp_held)]
        skipped = replay.direct(subject, base, source, skips)[:, :, 0]
        by_layer = [part.unflatten(1, (len(layers), -1)) for part in (swept, skipped)]
        ways.append(torch.cat(by_layer, dim=2).flatten(1, 2))
    return ways[0], ways[1]


def path_effects(study: Study) -> pd.DataFrame:
    """Effect of the last token's residual stream after each layer, `site` in `HELD`: T2, T2b, T2 - T2b or the first treatment."""
    subject, tables = study.subject, []
    layers, own = range(subject.n_layers), ("T2", "T2b") if study.of("T2") else study.treatments[:1]
    wanted = [Mediator(name, layer) for layer in layers for name in HELD]
    for group in progress(estimands.batches(study.of(*own), subject), desc="carriers"):
        batch = estimands.run_clean(subject, group)
        patched, openers = held_residuals(subject, batch, layers), study.openers[group[0].pair.treatment]
        for outcome in ("Y1", "Y1.frozen"):
            cells = estimands.score_cells(subject, batch, patched, openers, outcome)
            tables.append(estimands.tidy(group, wanted, outcome, cells))
    return estimands.with_difference(estimands.with_estimands(pd.concat(tables, ignore_index=True)), study.twins)


def path_shares(
    table: pd.DataFrame, layer: int, value: str = "nie", paths: Mapping[str, Mapping[str, int]] = PATHS
) -> Quantity | None:
    """Each path's share of the effect of one layer's residual stream on test; None where that is not positive on discover."""
    at = table[table.layer == layer]
    if not at.loc[(at.split == "discover") & (at.site == "live"), value].mean() > 0:
        return None
    ways = sorted(HELD)  # all of them, in the order in which a table's sums have them
    top = np.array([[path.get(name, 0) for name in ways] for path in paths.values()], dtype=float)
    live = np.tile([float(name == "live") for name in ways], (len(paths), 1))
    return Quantity(at[at.split == "test"], [value], ["site"], clusters.ratio(top, live))


def shares_by_layer(table: pd.DataFrame, treatment: str) -> pd.DataFrame | NotDefined:
    """Shares of MLPs, attention and skip path from each layer on: path, layer, estimate, low, high; and `hand_over` on test.

    From the layers after which the last token holds at least a tenth of TE on discover, but for the last.
    """
    signed = summaries.signed_contrast(table, treatment, list(HELD), split=None)
    held = signed[(signed.split == "discover") & (signed.site == "live")].groupby("layer")[["nie", "te"]].sum()
    paths, rows = {name: PATHS[name] for name in ("MLPs", "attention", "skip")}, []
    for layer in held.index[(held.nie >= LEAST * held.te) & (held.index < signed.layer.max())]:
        if found := path_shares(signed, layer, paths=paths):
            rows.append(found.estimates().to_frame(pd.DataFrame({"path": list(paths), "layer": layer})))
    if not rows:
        return NotDefined("Below the last layer the last token holds too little to be shared out.")
    made = pd.concat(rows, ignore_index=True)[["path", "layer", "estimate", "low", "high"]]
    return made.assign(hand_over=hand_over_layer(table, treatment, "test").layer.max())


def hand_over_layer(table: pd.DataFrame, treatment: str, split: str) -> pd.DataFrame:
    """The first layer after which the last token's residual stream has more than half of the total effect.

    Effects of the last token and of all others add up to TE at every layer, so this is where it overtakes them. One row:
    layer, low, high (percentiles of 2000 bootstraps over topics, as a layer is a whole number), n_pairs, n_topics; no row for
    a split of fewer than two topics. Without a crossing it is the last layer, which has everything by construction.
    """
    part = summaries.signed_contrast(table, treatment, ["live"], split=split)
    columns = ["layer", "low", "high", "n_pairs", "n_topics"]
    if part.topic.nunique() < 2:
        return pd.DataFrame(columns=columns)
    sums = clusters.cluster_sums(part, ["nie", "te"], by=["layer"])
    nie, te = ((sums.columns["value"] == name).to_numpy() for name in ("nie", "te"))

    def crossing(total: np.ndarray, count: np.ndarray) -> np.ndarray:
        ahead = total[:, nie] > total[:, te] / 2
        return np.where(ahead.any(1), ahead.argmax(1), ahead.shape[1] - 1)[:, None].astype(float)

    found = interval(sums, crossing)
    low, high = np.percentile(found.replicates[:, 0], [2.5, 97.5], method="nearest")
    numbers = (found.estimate[0], low, high, part.pair_id.nunique(), part.topic.nunique())
    return pd.DataFrame([numbers], columns=columns).astype(int)


# ---- which tokens hold it ----


def position_groups(study: Study) -> list[str]:
    """Position groups that some pair of the generation and recognition treatments has, in reading order; none overlap."""
    header, places = estimands.user_header(study.subject), dict[str, list[float]]()
    for pair in study.of(*TREATMENTS) or study.pairs:
        masks = positions.groups(pair, header)
        for name in positions.present(masks):
            places.setdefault(name, []).append(float(np.flatnonzero(masks[name]).mean() / len(pair.control)))
    return sorted(places, key=lambda name: float(np.mean(places[name])))


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


def token_effects(study: Study, treatments: Sequence[str] = ()) -> pd.DataFrame:
    """Effects (Y1) of every group's residual stream in both directions, with T2 - T2b behind them, on test pairs.

    By default of `TREATMENTS`, or the first treatment of a set without these, on at most 80 pairs each; fewer pairs and layers
    where each is costly. A pair of another split, which only gives TE its sign, has one row. Columns of `estimands.tidy`, in
    log-odds; `position` is the group.
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
    """The first layer, which tells what was read, and `Study.thinned_layers`."""
    return sorted({0, *study.thinned_layers})


def group_shares(study: Study, table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Share of TE in each group's residual stream on test: treatment, group, earliest, layer, estimate, low, high.

    The mean of both directions. Groups stand in reading order, without those before the first token that differs, which
    carry exactly 0; `earliest` is the first layer at which a group can differ.
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
    header, found = estimands.user_header(study.subject), dict[str, int]()
    for group in estimands.batches(study.of(treatment.removesuffix("-T2b")), study.subject):
        run = estimands.run_clean(study.subject, group[:1]).control
        for pair in group:
            layers = arrival_layers(run, pair)
            for name, mask in positions.groups(pair, header).items():
                found[name] = int(layers[mask].min(initial=found.get(name, study.subject.n_layers)))
    return found


def position_effects(study: Study, pair: TokenPair, sites: Sequence[str] = SITES) -> pd.DataFrame:
    """Share of one pair's TE at every token, layer and site, mean of both directions.

    Columns: site, layer (those of `token_effects`), position, token, earliest, share; tokens and `earliest` as in `group_shares`.
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
