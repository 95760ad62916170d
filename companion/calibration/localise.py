"""What was built into a compiled model and where, and which estimator finds it: scores of components and neurons.

The mechanism of T2 - T2b is everything on the last token's way from the wrapper to the outcome: heads that fetch the
wrapper, stages that compute from it, whatever writes the decision, and the side route. Components are attention or MLP
outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from companion.base.thresholds import COMPONENTS
from companion.calibration.campaign import SCORES
from companion.calibration.rates import ranking_quality
from companion.evidence.layers import Layers
from companion.evidence.neurons import Neurons
from companion.mediation import summaries
from companion.mediation.study import Study
from companion.mediation.summaries import Variant
from companion.neurons import screening
from companion.neurons.adjacency import HALF_WIDTH
from companion.neurons.single import in_split, sign_on_discover
from organisms import compiled, compiled_truth
from organisms.compiled import Organism
from organisms.compiled_design import Design
from organisms.compiled_program import CHANNELS

VARIANTS = {
    "total": Variant("main"), "full response": Variant("", outcome="Y2"), "direct": Variant("", outcome="contrast.frozen"),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Evidence rows (`files.EVIDENCE`) with the tables behind them, for whoever compares estimators."""

    rows: pd.DataFrame
    layers: Layers | None
    neurons: Neurons | None
    computed: pd.DataFrame | None  # effects of what each component computes (`mechanisms`)


@dataclass(frozen=True)
class Built:
    """A built model as a study, with what is true of it: `parts` says what is where, `claims` which claims hold.

    `te` is the total effect of each T2 and T2b pair, in log-odds by pair id: it follows from the written numbers alone.
    """

    study: Study
    parts: pd.DataFrame
    te: pd.Series
    claims: Mapping[str, bool | None]

    def measured(self, title: str, shares: pd.Series) -> pd.DataFrame:
        """For the drawing: `parts` beside the measured shares of the total effect, in the same order."""
        return self.parts.assign(model=title, share=shares.to_numpy())[["model", "layer", "site", "role", "share"]]


def built(kind: str, seed: int) -> Built:
    """The model of a kind and seed with the pairs on which the draws of the calibration are measured."""
    organism = compiled.draw(kind, seed, topics=compiled.TOPICS, pairs_per_topic=1)
    pairs = [planned for planned in organism.pairs if planned.pair.treatment in ("T2", "T2b")]
    te = pd.Series(compiled_truth.total_effects(organism.program, pairs), [one.pair.id for one in pairs])
    return Built(compiled.study(organism), written_parts(organism.design), te, organism.claims)


def written_parts(design: Design) -> pd.DataFrame:
    """What the attention and the MLP of each layer were written to do with wrapper and harm: layer, site, role ("" for nothing).

    A decision that is copied was made at the token `<end>`, the last one of the request.

    >>> from organisms.compiled_design import draw_design
    >>> written_parts(draw_design("late", 11)).query("role != '' and layer > 2").role.tolist()
    ['reads the wrapper', 'decides', 'writes']
    """
    at, side = " (at <end>)" if design.writer == "copy" else "", design.side
    told = [("attn_out", design.recognise[0], "reads the request"), ("mlp_out", design.recognise[1], "sees harm")]
    told += [("attn_out", layer, f"reads the wrapper{at}") for layer in design.carry]
    for stage in design.stages:
        does = ["decides"] * (stage.op != "relay") + ["writes"] * (stage.target == "out")
        told.append(("mlp_out", stage.layer, (" and ".join(does) or "passes on") + at))
    if design.writer != "mlp":
        told.append(("attn_out", design.write_layer, "copies" if at else "decides and writes"))
    if side:
        sites = COMPONENTS if side.copy is None else ("attn_out",)
        told += [(site, side.layer if side.copy is None else side.copy, "side route") for site in sites]
    rows = [
        (layer, site, ", ".join(role for name, where, role in told if (name, where) == (site, layer)))
        for layer in range(design.n_layers)
        for site in COMPONENTS
    ]
    return pd.DataFrame(rows, columns=["layer", "site", "role"])


def writer(design: Design) -> tuple[str, int]:
    """The component (site, layer) that writes the decision."""
    return ("mlp_out" if design.writer == "mlp" else "attn_out"), design.write_layer


def decider(design: Design) -> tuple[str, int]:
    """The component (site, layer), at whatever token, in which wrapper and request become the decision."""
    computing = [stage.layer for stage in design.stages if stage.op != "relay"]
    return ("mlp_out", computing[0]) if computing else writer(design)


def mechanism_components(design: Design) -> set[tuple[str, int]]:
    """All components (site, layer) of the mechanism at the last token; what is copied from `<end>` enters by the copying."""
    side, found = design.side, {writer(design)}
    if design.writer != "copy":
        found |= {("attn_out", layer) for layer in design.carry} | {("mlp_out", stage.layer) for stage in design.stages}
    if side:
        own = {("attn_out", side.layer), ("mlp_out", side.layer)}
        found |= own if side.copy is None else {("attn_out", side.copy)}
    return found


def mechanism_neurons(organism: Organism) -> Bool[np.ndarray, "layer neuron"]:
    """Which neurons write a channel of the mechanism that counts at the last token."""
    names = ["out.side", *([] if organism.design.writer == "copy" else ["stage0", "stage1", "stage2", "out"])]
    columns = [CHANNELS[name] for name in names]
    return np.stack([(mlp.out[:, columns] != 0).any(axis=1) for mlp in organism.program.mlps])


def effects_of(table: pd.DataFrame, treatment: str, name: str) -> pd.DataFrame:
    """Effects of attention and MLP outputs on the last token, of one of the kinds in `VARIANTS`."""
    sites = [f"{site}.direct" if name == "direct" else site for site in COMPONENTS]
    return summaries.select(table, treatment, VARIANTS[name], sites)


def localise_draw(organism: Organism, this: Study, measured: Measured) -> pd.DataFrame:
    """One row an estimator and measure of how well it finds the mechanism (`SCORES`), from all pairs of T2 - T2b.

    Is the component of the largest mean signed effect the writer (by site and layer), and the decider? What is computed beyond
    the sum of the inputs shows the decider alone.
    """
    effects: dict[str, pd.DataFrame] = {}
    if measured.layers:
        effects = {name: effects_of(measured.layers.effects, "T2-T2b", name) for name in VARIANTS}
    if measured.computed is not None:
        effects["computed"] = measured.computed
    found: list[tuple[str, str, float]] = []
    known, true, decides = mechanism_components(organism.design), writer(organism.design), decider(organism.design)
    for name in (name for name, table in effects.items() if len(table)):
        table = summaries.signed(effects[name])
        mean = table.assign(site=table.site.str.removesuffix(".direct")).groupby(["site", "layer"])["nie"].mean()
        at = mean.idxmax()
        if name != "computed":
            quality = ranking_quality([key in known for key in mean.index], mean)
            found += [(name, f"components, {what}", value) for what, value in quality.items()]
            found += [(name, "layer error", abs(at[1] - true[1])), (name, "module accuracy", at[0] == true[0])]
        found += [(name, "decision found", at == decides), (name, "decision, layer error", abs(at[1] - decides[1]))]
    if measured.neurons:
        member = mechanism_neurons(organism).ravel()
        for name, score in neuron_scores(measured.neurons, this).items():
            quality = ranking_quality(member.tolist(), score.tolist())
            found += [(name, f"neurons, {what}", value) for what, value in quality.items()]
    table = pd.DataFrame(found, columns=["estimator", "what", "value"]).astype({"value": float})
    return table.assign(kind=organism.design.kind, seed=organism.design.seed)[list(SCORES)]


def neuron_scores(found: Neurons, this: Study) -> dict[str, Float[np.ndarray, "neuron"]]:
    """Scores of all neurons, layer by layer: exact total and direct effect, window mean, gradient screen.

    A window is the mean signed effect of a neuron and its 8 neighbours by index on either side, as far as there are any.
    """
    effects = found.measured.effects["T2-T2b"]
    sign, d_mlp = sign_on_discover(effects.pairs), found.measured.study.subject.d_mlp
    mean = {name: sign * values.mean(0) for name, values in in_split(effects, "all").values.items()}
    total, box = (mean["nie0"] + mean["nie1"]) / 2, np.ones(2 * HALF_WIDTH + 1)
    size = np.convolve(np.ones(d_mlp), box, "same")
    scores = {
        "total": total,
        "direct": mean["direct"],
        "window": np.concatenate([np.convolve(layer, box, "same") / size for layer in total.reshape(-1, d_mlp)]),
        "gradient screen": screening.estimates(this, "T2-T2b").estimate.to_numpy(),
    }
    return {name: abs(values) for name, values in scores.items()}
