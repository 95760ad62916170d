"""Single neurons: exact NIE0, NIE1 and direct effect of each at the last token, and the table made of them.

A neuron is one entry of a down projection's input. The last layer has a closed form, other layers are replayed, and layers
that no difference can have reached are exact zeros that cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats as st
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import progress
from companion.base.errors import InputError
from companion.base.thresholds import SATURATED
from companion.mediation import estimands, outcomes
from companion.mediation.estimands import twin_rows
from companion.mediation.study import Study
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import projection
from companion.model.replay import each_neuron
from companion.neurons import closed_form
from companion.prompts.tokens import Openers
from companion.stats import clusters

# One row: one neuron's mean effects over the pairs of a split, signed by TE on discover; the interval is of the mean of
# `nie0` and `nie1`. `exact` is False where only a gradient estimate is known.
NEURONS = ["treatment", "split", "layer", "neuron", "te", "nie0", "nie1", "direct", "ci_low", "ci_high", "q_value",
           "exact"]  # fmt: skip
SPLITS = ("discover", "validate", "test", "all")
FLOOR = 0.01  # an effect below this share of TE is not counted, however sure
LEVEL = 0.05
SATURATION = np.log((1 - SATURATED) / SATURATED)
BLOCK = 1 << 24  # numbers that are alive at once


@dataclass(frozen=True)
class PairEffects:
    """Effects of many mediators on the pairs of one treatment, in log-odds, not signed.

    `pairs` has a row a pair (pair_id, topic, split, te; `unsaturated`: both clean runs, for a contrast the harmful pair's, have
    p in [0.02, 0.98]), `columns` a row a mediator (layer and neuron, or a set); `values`: "nie0", "nie1", of neurons "direct".
    """

    treatment: str
    pairs: pd.DataFrame
    columns: pd.DataFrame
    values: Mapping[str, Float[np.ndarray, "pair column"]]

    @property
    def nie(self) -> Float[np.ndarray, "pair column"]:
        """The mean of both directions."""
        return (self.values["nie0"] + self.values["nie1"]) / 2


@dataclass(frozen=True)
class FinalStates:
    """What joint effects of last-layer neurons need of both clean runs (side 0: control), all at the last token."""

    treatment: str
    pairs: pd.DataFrame
    openers: Openers
    resid: Float[Tensor, "side pair d"]
    neurons: Float[Tensor, "side pair neuron"]

    def only(self, keep: Bool[np.ndarray, "pair"]) -> FinalStates:
        """Some of the pairs."""
        at = torch.tensor(np.flatnonzero(keep), device=self.resid.device)
        pairs = self.pairs[keep].reset_index(drop=True)
        return replace(self, pairs=pairs, resid=self.resid[:, at], neurons=self.neurons[:, at])


def difference(harmful: PairEffects, twin: PairEffects, twins: Mapping[str, str]) -> PairEffects:
    """T2 - T2b, pair by pair: each T2 pair minus its harmless twin; T2 pairs without one are left out."""
    own, at = twin_rows(harmful.pairs, twin.pairs, twins)
    pairs = harmful.pairs.iloc[own].reset_index(drop=True)
    pairs = pairs.assign(te=pairs.te - twin.pairs.te.to_numpy()[at])
    values = {name: values[own] - twin.values[name][at] for name, values in harmful.values.items()}
    return PairEffects(f"{harmful.treatment}-{twin.treatment}", pairs, harmful.columns, values)


def sign_on_discover(pairs: pd.DataFrame) -> float:
    """The sign of the mean TE on discover, by which a treatment's effects are signed."""
    discover = pairs.te[pairs.split == "discover"]
    if discover.empty:
        raise InputError("no pair is in the discover split, which fixes the sign of the effects: give it more topics")
    return 1.0 if discover.mean() >= 0 else -1.0


def signed(effects: PairEffects, sign: float | None = None) -> PairEffects:
    """The same effects, multiplied by a sign: by default that of their own TE on discover."""
    sign = sign_on_discover(effects.pairs) if sign is None else sign
    values = {name: sign * values for name, values in effects.values.items()}
    return replace(effects, pairs=effects.pairs.assign(te=sign * effects.pairs.te), values=values)


def in_split(effects: PairEffects, split: str) -> PairEffects:
    """The pairs of one split, or ("all") of all."""
    keep = ((effects.pairs.split == split) | (split == "all")).to_numpy()
    values = {name: values[keep] for name, values in effects.values.items()}
    return replace(effects, pairs=effects.pairs[keep].reset_index(drop=True), values=values)


def in_columns(effects: PairEffects, keep: Bool[np.ndarray, "column"]) -> PairEffects:
    """Some of the mediators."""
    values = {name: array[:, keep] for name, array in effects.values.items()}
    return replace(effects, columns=effects.columns[keep].reset_index(drop=True), values=values)


def neuron_table(effects: PairEffects) -> pd.DataFrame:
    """One row for each neuron and split (`NEURONS`): means over pairs, interval by topic, Benjamini-Yekutieli q-value.

    Neurons that are 0 in every pair, because nothing can have reached them, are not tested (q = 1). A split of a
    single topic has no interval.
    """
    effects = signed(effects)
    can_differ = np.any([np.any(values != 0, axis=0) for values in effects.values.values()], axis=0)
    parts = {split: in_split(effects, split) for split in SPLITS}
    tables = [_split_table(part, split, can_differ) for split, part in parts.items() if len(part.pairs)]
    return pd.concat(tables, ignore_index=True)[NEURONS]


def _split_table(part: PairEffects, split: str, can_differ: Bool[np.ndarray, "column"]) -> pd.DataFrame:
    means = {name: values.mean(0) for name, values in part.values.items()}
    half, q = np.where(can_differ, np.inf, 0.0), np.ones(len(part.columns))
    if part.pairs.topic.nunique() > 1:
        test = clusters.clustered_t(part.nie, part.pairs.topic.to_numpy())
        half = st.t.isf(0.025, test.df) * test.se
        if can_differ.any():
            q[can_differ] = multipletests(test.p[can_differ], method="fdr_by")[1]
    middle = part.nie.mean(0)
    return part.columns.assign(
        treatment=part.treatment, split=split, te=part.pairs.te.mean(), **means,
        ci_low=middle - half, ci_high=middle + half, q_value=q, exact=True,
    )  # fmt: skip


def passing(rows: pd.DataFrame) -> Bool[np.ndarray, "row"]:
    """Which rows of a neuron table count: q-value at most 0.05, and |NIE| at least 1 % of |TE|."""
    middle = (rows.nie0 + rows.nie1) / 2
    return ((rows.q_value <= LEVEL) & (middle.abs() >= FLOOR * rows.te.abs()) & rows.exact).to_numpy()


def ranking(rows: pd.DataFrame, treatment: str, layer: int) -> Int[np.ndarray, "neuron"]:
    """Neurons of a layer, the largest |mean NIE| on discover first; by sign, hundreds of tiny means would come early."""
    chosen = rows[(rows.treatment == treatment) & (rows.split == "discover") & (rows.layer == layer)]
    if chosen.empty:
        raise InputError(f"the neuron table has no rows of {treatment}, layer {layer}, on discover: run notebook 04")
    size = ((chosen.nie0 + chosen.nie1) / 2).to_numpy()
    return chosen.neuron.to_numpy()[np.argsort(-abs(size), kind="stable")]


def all_neurons(subject: Subject, layers: Sequence[int] | None = None) -> pd.DataFrame:
    """One row (layer, neuron) for every neuron of the layers (all by default)."""
    chosen = list(range(subject.n_layers) if layers is None else layers)
    return pd.MultiIndex.from_product([chosen, range(subject.d_mlp)], names=["layer", "neuron"]).to_frame(index=False)


def last_outputs(study: Study, columns: Mapping[str, pd.DataFrame]) -> Float[Tensor, "neuron row"] | None:
    """`closed_form.last_layer_outputs`, if measuring these neurons of each treatment reads them."""
    subject, last = study.subject, study.subject.n_layers - 1
    reads = [study.openers[name].rest and (chosen.layer == last).any() for name, chosen in columns.items()]
    return closed_form.last_layer_outputs(subject) if any(reads) and closed_form.is_closed(subject) else None


def measure_chosen(
    study: Study, treatment: str, columns: pd.DataFrame, said: Float[Tensor, "neuron row"] | None = None
) -> tuple[PairEffects, FinalStates]:
    """NIE0, NIE1 and direct effect of the neurons in `columns` (layer, neuron) on every pair of a treatment, on Y1.

    The direct effect is the neuron's own write into the final residual stream, everything above it held and the final
    norm's scale frozen at the base run's, as the mean of both directions. `said`: `last_outputs` that is at hand.
    """
    groups = estimands.batches(study.of(treatment), study.subject)
    if not groups:
        raise InputError(f"the study has no pairs of {treatment}: it has {', '.join(study.treatments)}")
    subject, openers = study.subject, study.openers[treatment]
    pairs, values, residuals, inputs = [], [], [], []
    said = last_outputs(study, {treatment: columns}) if said is None else said
    for group in progress(groups, desc=f"neurons, {treatment}"):
        batch = estimands.run_clean(subject, group)
        runs = batch.control, batch.treated
        # The shape of the replay's own read-out, so that a patch that changes nothing has an effect of exactly 0.
        clean = [outcomes.log_odds(subject, run.resid_post[-1][:, None, -1:], openers)[:, 0] for run in runs]
        y00, y11 = (to_host(odds[:, 0]) for odds in clean)
        unsaturated = np.maximum(abs(y00), abs(y11)) <= SATURATION
        named = pd.DataFrame(estimands.pair_columns(group)).drop(columns="treatment")
        pairs.append(named.assign(te=y11 - y00, unsaturated=unsaturated))
        values.append(_batch_values(subject, runs, columns, openers, clean, said))
        residuals.append(torch.stack([run.resid_post[-1][:, -1] for run in runs]))
        inputs.append(torch.stack([run.neurons[-1][:, -1] for run in runs]))
    known = pd.concat(pairs, ignore_index=True)
    joined = {name: np.concatenate([one[name] for one in values]) for name in values[0]}
    states = FinalStates(treatment, known, openers, torch.cat(residuals, dim=1), torch.cat(inputs, dim=1))
    return PairEffects(treatment, known, columns.reset_index(drop=True), joined), states


def _batch_values(
    subject: Subject, runs: tuple[CleanRun, CleanRun], columns: pd.DataFrame, openers: Openers, clean: Sequence[Tensor],
    said: Tensor | None,
) -> dict[str, Float[np.ndarray, "pair column"]]:  # fmt: skip
    found = {name: np.zeros((len(clean[0]), len(columns))) for name in ("nie0", "nie1", "direct")}
    layers, neurons = columns["layer"].to_numpy(), columns["neuron"].to_numpy()
    below: dict[int, np.ndarray] = {}  # places of the columns of each layer whose own writes are read out together
    for layer in np.unique(layers).tolist():
        if torch.equal(runs[0].neurons[layer][:, -1], runs[1].neurons[layer][:, -1]):
            continue  # no difference has reached this layer: exact zeros
        at = np.flatnonzero(layers == layer)
        chosen = subject.tensor(neurons[at])
        if layer == subject.n_layers - 1 and openers.rest and closed_form.is_closed(subject):
            four = closed_form.last_layer_both_ways(subject, *runs, openers.refuse, said)
            y01, y10, own01, own10 = (one[:, chosen] for one in four)
            found["nie0"][:, at], found["nie1"][:, at] = to_host(y01 - clean[0]), to_host(clean[1] - y10)
            found["direct"][:, at] = to_host((own01 - clean[0]) - (own10 - clean[1])) / 2
            continue
        below[layer] = at
        for side, name, sign in ((0, "nie0", 1), (1, "nie1", -1)):
            base, source = runs[side], runs[1 - side]
            if layer == subject.n_layers - 1:
                after = closed_form.last_layer_log_odds(subject, base, source, openers)[:, chosen]
            else:
                y1 = partial(outcomes.log_odds, subject, openers=openers)
                after = each_neuron(subject, base, source, layer, chosen, y1)
            found[name][:, at] = sign * to_host(after - clean[side])
    if below:
        at = np.concatenate([*below.values()])
        written = {layer: subject.tensor(neurons[places]) for layer, places in below.items()}
        for side, sign in ((0, 1), (1, -1)):
            own = _own_writes(subject, runs[side], runs[1 - side], written, openers)
            found["direct"][:, at] += sign * to_host(own - clean[side]) / 2
    return found


def _own_writes(
    subject: Subject, base: CleanRun, source: CleanRun, chosen: Mapping[int, Int[Tensor, "neuron"]], openers: Openers
) -> Float[Tensor, "pair neuron"]:
    """Y1 if only what the neuron itself writes reaches the final norm, whose scale stays the base's; layer by layer."""
    resid = base.resid_post[-1][:, None, -1]
    vectors = {at: written_vectors(projection(subject.layers[at], "neuron"))[some] for at, some in chosen.items()}
    changes = {at: (source.neurons[at] - base.neurons[at])[:, -1, some] for at, some in chosen.items()}
    if openers.rest and closed_form.is_closed(subject):
        change, written = torch.cat([*changes.values()], 1), torch.cat([*vectors.values()])
        frozen = torch.ones(len(change), dtype=torch.bool, device=change.device)
        return closed_form.written_log_odds(subject, resid[:, 0], change, written, openers.refuse, frozen)
    step = max(1, BLOCK // max(1, len(resid) * subject.d_model))
    read = []
    for layer, change in changes.items():
        for some, written in zip(change.split(step, dim=1), vectors[layer].split(step), strict=True):
            moved = resid + residual_change(subject, layer, base.neurons[layer][:, -1], some[..., None] * written)
            read.append(outcomes.log_odds(subject, moved, openers, norm_like=resid))
    return torch.cat(read, dim=1)


def residual_change(
    subject: Subject, layer: int, neurons: Float[Tensor, "pair neuron"], change: Float[Tensor, "pair set d"]
) -> Float[Tensor, "pair set d"]:
    """What an MLP adds to the residual stream beyond its clean write, if its down projection's output changes.

    That is the change itself, except in families that normalise what it writes. `neurons`: the projection's clean inputs.
    """
    parts = subject.layers[layer]
    if parts.mlp_post is None:
        return change
    raw = projection(parts, "neuron")(neurons)[:, None]
    return torch.as_tensor(parts.mlp_post(raw + change) - parts.mlp_post(raw))
