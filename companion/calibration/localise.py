"""Which estimator finds what was built: scores of components and neurons against a compiled model's true mechanism.

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

from companion.base import thresholds
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
from companion.stats.rates import mean_change
from organisms.compiled import Organism
from organisms.compiled_program import CHANNELS, Design

ESTIMATORS = ("total", "full response", "direct", "computed", "gradient screen", "window")
MEASURES = ("members ranked above others (AUROC)", "members among the k largest (P@k)")
WHAT: Mapping[str, Mapping[str, str]] = {  # what is looked for -> measure -> its name in the table
    "components": {MEASURES[0]: "components, auroc", MEASURES[1]: "components, P@k"},
    "neurons": {MEASURES[0]: "neurons, auroc", MEASURES[1]: "neurons, P@k"},
    "the deciding component": {MEASURES[1]: "decision found"},
}
VARIANTS = {
    "total": Variant("main"),
    "full response": Variant("", outcome="Y2"),
    "direct": Variant("", outcome="contrast.frozen"),
}


@dataclass(frozen=True)
class Measured:
    """Evidence rows (`files.EVIDENCE`) with the tables behind them, for whoever compares estimators."""

    rows: pd.DataFrame
    layers: Layers | None
    neurons: Neurons | None
    computed: pd.DataFrame | None  # effects of what each component computes (`mechanisms`)


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
    names = ["out.side"] + (["stage0", "stage1", "stage2", "out"] if organism.design.writer != "copy" else [])
    columns = [CHANNELS[name] for name in names]
    return np.stack([(mlp.out[:, columns] != 0).any(axis=1) for mlp in organism.program.mlps])


def localise_draw(organism: Organism, this: Study, measured: Measured) -> pd.DataFrame:
    """One row an estimator and measure of how well it finds the mechanism (`SCORES`), from all pairs of T2 - T2b."""
    found: list[tuple[str, str, float]] = []
    if measured.layers:
        for name, variant in VARIANTS.items():
            sites = [site + (".direct" if name == "direct" else "") for site in thresholds.COMPONENTS]
            table = summaries.select(measured.layers.effects, "T2-T2b", variant, sites)
            found += _component_rows(organism, name, table) if len(table) else []
    if measured.computed is not None and len(measured.computed):
        found += _decision_rows(organism, "computed", _component_means(measured.computed))
    if measured.neurons:
        member = mechanism_neurons(organism).ravel()
        for name, score in neuron_scores(measured.neurons, this).items():
            quality = ranking_quality(member.tolist(), score.tolist())
            found += [(name, f"neurons, {what}", value) for what, value in quality.items()]
    table = pd.DataFrame(found, columns=["estimator", "what", "value"])
    return table.assign(kind=organism.design.kind, seed=organism.design.seed)[list(SCORES)]


def _component_means(effects: pd.DataFrame) -> pd.Series:
    """Mean signed NIE by (site, layer)."""
    table = summaries.signed(effects)
    return table.assign(site=table.site.str.removesuffix(".direct")).groupby(["site", "layer"])["nie"].mean()


def _component_rows(organism: Organism, name: str, effects: pd.DataFrame) -> list[tuple[str, str, float]]:
    """Ranking of components; whether the largest effect is the writer's, by site and by layer; and the decider's rows."""
    means, known = _component_means(effects), mechanism_components(organism.design)
    quality = ranking_quality([key in known for key in means.index], means)
    (site, layer), (true_site, true_layer) = means.idxmax(), writer(organism.design)
    return [
        *((name, f"components, {what}", value) for what, value in quality.items()),
        (name, "layer error", float(abs(layer - true_layer))),
        (name, "module accuracy", float(site == true_site)),
        *_decision_rows(organism, name, means),
    ]


def _decision_rows(organism: Organism, name: str, means: pd.Series) -> list[tuple[str, str, float]]:
    """Whether the largest effect is that of the component which makes the decision, and how many layers off it is."""
    found, true = means.idxmax(), decider(organism.design)
    error = float(abs(found[1] - true[1]))
    return [(name, "decision found", float(found == true)), (name, "decision, layer error", error)]


def compare_estimators(table: pd.DataFrame) -> pd.DataFrame:
    """For the figure: the mean of each measure and its interval, a row an estimator and what it looks for, on common models.

    The models of a row are those that all estimators of the same thing were asked about. The decision is one component, so its
    P@k is the share of models in which the largest is it.
    """
    rows = []
    for what, names in WHAT.items():
        for measure, name in names.items():
            part = table[table.what == name].dropna()
            wide = part.pivot(index=["kind", "seed"], columns="estimator", values="value").dropna()
            models = np.array([f"{kind} {seed}" for kind, seed in wide.index])
            for estimator in (one for one in ESTIMATORS if one in wide and len(wide) > 1):
                found = mean_change(wide[estimator].to_numpy(), models)
                rows.append((measure, estimator, what, found.estimate, found.low, found.high, len(wide)))
    made = pd.DataFrame(rows, columns=["measure", "estimator", "what", "estimate", "low", "high", "models"])
    places = {name: i for i, name in enumerate([*MEASURES, *ESTIMATORS])}
    by = ["measure", "estimator"]
    return made.sort_values(by, key=lambda names: names.map(places), kind="stable", ignore_index=True)


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
