"""How an indirect effect comes about: which component computes the decision, and what carries it on to the output.

Computed (C1). A head that only copies what an earlier layer decided has indirect and direct effects, too. For the four prompts
(harmless or harmful request) x (neutral or jailbreak wrapper), the input that a component f *would* get if everything before
it were additive is h10 + h01 - h00, and what f computes from it beyond the sum of its outputs is

    G = f(h10 + h01 - h00) - f(h10) - f(h01) + f(h00)

A linear copy has G = 0, whatever it copies. The effect of G is measured as any other: taken away from the jailbroken
harmful run, or added to the neutral harmful one, at all positions from the first that differs, with everything above live.

Carried (C4). The residual stream at the last token is set to the other run's value after one layer. Above it, at the last
token, attention outputs and MLP outputs either react or are held at the base run's values; comparing the ways says which
of them the signal needs on its way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import NotDefined, progress
from companion.base.thresholds import COMPONENTS
from companion.mediation import estimands, outcomes, summaries
from companion.mediation.estimands import Batch, Mediator
from companion.mediation.study import Study
from companion.model import memory, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch, component_output, position_mask
from companion.stats import clusters
from companion.stats.bootstrap import Quantity, interval

# Of `summaries.VARIANTS` those that the carried and the computed signal have.
CARRIED_VARIANTS = tuple(one for one in summaries.VARIANTS if one.name != "full response")
COMPUTED_VARIANTS = tuple(one for one in CARRIED_VARIANTS if one.name != "norm frozen")
SIGNS = {"10": 1, "01": 1, "00": -1}  # first digit: harmful request, second: jailbreak wrapper
# Which outputs above the patched layer are held at the base run's values, by the name that the effect table calls it.
HELD: dict[str, tuple[str, ...]] = {
    "live": (),
    "attention held": ("attn_out",),
    "MLPs held": ("mlp_out",),
    "both held": ("attn_out", "mlp_out"),
    "all held": ("attn_out", "mlp_out"),  # and the MLP output of the patched layer itself
}
# The ways in which something above reacts; they come first.
SWEPT = {name: sites for name, sites in HELD.items() if len(sites) < 2}
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
    """Effect of what each component computes, in the schema of `estimands.measure_effects`: treatment T2-T2b, outcome Y1.

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
        patched = {}
        for name, base, sign in (("01", harmful.control, 1), ("10", harmful.treated, -1)):
            patches = [
                Patch(one.site, one.layer, behind, value=base.site(one.site, one.layer) + sign * change)
                for one, change in zip(wanted, more, strict=True)
            ]
            resid = replay.interchange(subject, base, base, patches)[:, :, 0]
            patched[name] = to_host(outcomes.log_odds(subject, resid, study.openers["T2"]))
        odds = {}
        for name, run in runs.items():
            openers = study.openers["T2" if name[0] == "1" else "T2b"]
            odds[name] = to_host(outcomes.log_odds(subject, run.resid_post[-1][:, -1:], openers))
        # y11 - y00 is TE of T2 - T2b, and y00 that of the harmful run.
        y11 = odds["11"] - odds["01"] + odds["00"]
        cells = {"y00": odds["10"], "y01": patched["01"], "y10": y11 - (odds["11"] - patched["10"]), "y11": y11}
        tables.append(estimands.tidy(pairs, wanted, "Y1", cells).assign(treatment="T2-T2b"))
    return estimands.with_estimands(pd.concat(tables, ignore_index=True)) if tables else pd.DataFrame()


# ---- what carries it on ----


def held_patches(subject: Subject, base: CleanRun, source: CleanRun, layers: Sequence[int]) -> list[tuple[Patch, ...]]:
    """For each layer the interventions of `SWEPT`: the source's residual stream, and what is held above it."""
    last, made = position_mask(base.tokens, -1), []
    for layer in layers:
        for sites in SWEPT.values():
            above = [(site, at) for site in sites for at in range(layer + 1, subject.n_layers)]
            held = (Patch(site, at, last, value=base.site(site, at)) for site, at in above)
            made.append((Patch("resid_post", layer, last), *held))
    return made


def skip_patches(base: CleanRun, source: CleanRun, layers: Sequence[int]) -> list[Patch]:
    """For each layer what "both held" and "all held" put in: nothing above reacts, so their effects are direct ones."""
    last, made = position_mask(base.tokens, -1), []
    for layer in layers:
        own_mlp_held = source.resid_post[layer] - source.site("mlp_out", layer) + base.site("mlp_out", layer)
        made += [Patch("resid_post", layer, last), Patch("resid_post", layer, last, value=own_mlp_held)]
    return made


def held_residuals(
    subject: Subject, batch: Batch, layers: Sequence[int]
) -> tuple[Float[Tensor, "pair way d"], Float[Tensor, "pair way d"]]:
    """Final residual stream at the last token for the cells 01 and 10; ways are layers times `HELD`."""
    both = (batch.control, batch.treated), (batch.treated, batch.control)
    into = (held_patches(subject, *runs, layers) for runs in both)
    at_once = memory.pairs_at_once(subject, batch.control.tokens.shape[1])
    ways = []
    for swept, runs in zip(replay.both_ways(subject, *both[0], *into, at_once=at_once), both, strict=True):
        skipped = replay.direct(subject, *runs, skip_patches(*runs, layers))[:, :, 0]
        by_layer = [part.unflatten(1, (len(layers), -1)) for part in (swept, skipped)]
        ways.append(torch.cat(by_layer, dim=2).flatten(1, 2))
    return ways[0], ways[1]


def path_effects(study: Study) -> pd.DataFrame:
    """Effect of the last token's residual stream after each layer, in the ways of `HELD` (column `site`).

    Rows for T2 and T2b, with T2 - T2b behind them, or for the first treatment where there is no T2.
    """
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
    """Each path's share of the whole effect of one layer's residual stream, on test: a ratio of means over pairs.

    `table` holds signed effects of one treatment and outcome. None where the layer's residual stream has no positive
    effect on discover, so that there is nothing to share out.
    """
    at = table[table.layer == layer]
    discover = at[(at.split == "discover") & (at.site == "live")]
    if at.empty or not discover[value].mean() > 0:
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

    Both directions averaged, the effects of the last token and of all other tokens together add up to TE at every layer, so
    this is where the last token overtakes all others. One row: layer, low, high (percentiles of 2000 bootstraps over topics,
    since a layer is a whole number), n_pairs, n_topics; no row for a split of fewer than two topics. Without a crossing it is
    the last layer, which has everything by construction.
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
