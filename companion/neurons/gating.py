"""Gate or contributor: the four tests of a set of neurons, and which sets and forms are tested and read by the verdict.

A contributor adds its own share to the outcome, whatever the rest of the network does. A gate decides whether something
else gets through: close it and the upstream signal is lost, open it without a signal and nothing happens. In a factorial
experiment with the switches *signal* (first digit) and *set* (second digit) a contributor leaves the interaction
y11 - y10 - y01 + y00 at zero, a gate makes it as large as the whole effect y11 - y00.

Fixed before the shipped models were measured: a sparse set is the top max(8, 1 % of the layer) of the discover ranking; the
verdict reads the sparse set (forms b and c) that is not a readout on discover and, among such, has the largest index there.
Changed after a first look at the embedded model, whose verdict it left as it was: form b with the harm signal switched by
the twin (`twin_cells`) was added, and the whole last layer, which is not sparse, is no longer read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor

from companion.base.thresholds import BENIGN_SHARE, GATE_LOW, PERPLEXITY, READOUT, few_neurons
from companion.mediation.estimands import CELLS
from companion.mediation.study import Study
from companion.model.architecture import Subject
from companion.neurons.clamping import LastLayerCache, NeuronSet, Rows, clamped_products, crossed, table_of
from companion.neurons.single import ranking
from companion.prompts.tokens import Openers
from companion.stats import bootstrap, clusters
from companion.stats.bootstrap import interval

LEAST = 0.2  # share of |TE| that must be at stake for an index to be defined
LAST, WHOLE = "last", "whole last layer"
WRAPPER_HARM, HARM_WRAPPER = "gate by wrapper x up by harm", "gate by harm x up by wrapper"
# By experiment (a form of `clamping.four_cells` or `twin_cells`): what stands in the tables. Below the last layer the
# experiment "upstream" is form c.
FORMS = {
    "upstream": "a: last layer, prompt x set", "inside": "b: gate x up", WRAPPER_HARM: f"b: {WRAPPER_HARM}",
    HARM_WRAPPER: f"b: {HARM_WRAPPER}", "below": "c: below the last layer, prompt x set",
}  # fmt: skip
VARIANTS = {"main": "Y1", "norm frozen": "Y1.frozen", "linear read-out": "contrast.frozen"}


@dataclass(frozen=True)
class GateIndex:
    """A gate index: `signed` with its interval (negative: one of several would do, an OR), and its absolute value.

    `is_defined`: on discover enough is at stake and the set takes part in it.
    """

    signed: bootstrap.Estimates
    estimate: float
    low: float
    high: float
    n_pairs: int
    is_defined: bool


def select(
    table: pd.DataFrame, treatment: str, name: str, form: str, outcome: str, split: str | None = None
) -> pd.DataFrame:
    """Rows of one treatment, set, form and outcome, in one split or in all."""
    keep = (table.treatment == treatment) & (table["set"] == name) & (table.form == form) & (table.outcome == outcome)
    return table[keep if split is None else keep & (table.split == split)]


def gate_index(part: pd.DataFrame) -> GateIndex | None:
    """Interaction over whole effect, pooled over the test pairs; None where discover or test has no pairs.

    Whether it is defined is decided by means: choosing pairs by the size of their own denominator would bias a ratio.
    """
    discover, test = (part[part.split == split] for split in ("discover", "test"))
    both = pd.DataFrame({"topic": test.topic, "span": test.y11 - test.y00, "interaction": interaction(test)})
    signed = None if discover.empty else ratio_of_means(both, "interaction", "span")
    if signed is None:
        return None
    estimate, low, high = (float(x[0]) for x in (signed.estimate, signed.low, signed.high))
    limits = (abs(low), abs(high))
    least = 0.0 if low <= 0 <= high else min(limits)
    means = discover[[*CELLS, "te"]].mean()
    at_stake = abs(means.y11 - means.y00)
    if part.form.isin(["upstream", "write"]).all():  # inside a neuron both switches belong to the set
        at_stake = min(at_stake, max(abs(means.y01 - means.y00), abs(means.y11 - means.y10)))
    is_defined = bool(at_stake / max(abs(float(means.te)), float(np.finfo(float).tiny)) >= LEAST)
    return GateIndex(signed, abs(estimate), least, max(limits), len(test), is_defined)


def ratio_of_means(part: pd.DataFrame, top: str, bottom: str) -> bootstrap.Estimates | None:
    """One column's mean over another's, topics drawn; None where there is nothing to divide."""
    if part.empty or not part[bottom].any():
        return None
    return interval(clusters.cluster_sums(part, [top, bottom]), clusters.ratio([1, 0], [0, 1]))


def interaction(part: pd.DataFrame) -> pd.Series:
    """What the two switches do together beyond the sum of what each does alone, in every pair."""
    return part.y11 - part.y10 - part.y01 + part.y00


def set_effect(part: pd.DataFrame) -> pd.Series:
    """(NIE0 + NIE1) / 2 of the set in every pair, from the cells of the upstream experiment."""
    return (part.y01 - part.y00 + part.y11 - part.y10) / 2


def readout_share(table: pd.DataFrame, treatment: str, name: str, split: str = "test") -> bootstrap.Estimates | None:
    """Share of the set's effect on Y1 that it writes into the last residual stream itself, by the frozen linear contrast."""
    whole = select(table, treatment, name, "upstream", "Y1", split).set_index("pair_id")
    write = select(table, treatment, name, "write", "contrast.frozen", split).set_index("pair_id")
    both = pd.DataFrame({"topic": whole.topic, "write": set_effect(write), "whole": set_effect(whole)})
    return ratio_of_means(both, "write", "whole")


def benign_share(table: pd.DataFrame, treatment: str, name: str, benign: list[str]) -> bootstrap.Estimates | None:
    """Mean |effect| of the set on benign behaviours (None: there are none) over its |effect| on harm, in log-odds.

    Each effect gets the sign that it has on discover, so that on test noise around zero is not counted as an effect.
    """
    parts = []
    for column in [treatment, *benign]:
        part = select(table, column, name, "upstream", "Y1")
        effect = set_effect(part)
        sign = -1.0 if effect[part.split == "discover"].mean() < 0 else 1.0
        parts.append(part.assign(effect=sign * effect)[part.split == "test"])
    test = pd.concat(parts)
    if not benign or test.empty or not test.effect.any():
        return None
    sums = clusters.cluster_sums(test, "effect", by=["treatment"])
    is_harm = (sums.columns["treatment"] == treatment).to_numpy(float)
    return interval(sums, clusters.ratio((1 - is_harm) / len(benign), is_harm))


def timing_share(table: pd.DataFrame, treatment: str, name: str) -> bootstrap.Estimates | None:
    """Effect of clamping the set at the first answer token only, over that of clamping it at all answer tokens."""
    chosen = table[(table.treatment == treatment) & (table["set"] == name) & (table.split == "test")]
    return ratio_of_means(chosen, "first", "every")


def perplexity_ratio(table: pd.DataFrame, name: str) -> bootstrap.Estimates | None:
    """Perplexity of the model's own benign answers with the set closed over that without: exp of nats per token."""
    chosen, per_token = table[table["set"] == name], clusters.ratio([1, 0], [0, 1])
    if chosen.empty:
        return None
    sums = clusters.cluster_sums(chosen, ["lost", "n_tokens"])
    return interval(sums, lambda total, count: np.exp(per_token(total, count)))


def twin_cells(
    subject: Subject, caches: Mapping[str, LastLayerCache], twin_of: Mapping[str, str], openers: Mapping[str, Openers],
    sets: Sequence[NeuronSet],
) -> pd.DataFrame:  # fmt: skip
    """Gate against up inside last-layer neurons with the harm signal switched by the harmless twin, as treatment T2 - T2b.

    Within a T2 pair only the wrapper changes, so an up-projection that carries the harm never moves; the harmless twin
    under the same wrapper switches the harm off. The forms are gate by wrapper and up by harm, and the other way round.

    Rows are as in `clamping.four_cells`, for T2 pairs with a twin of any length; `te` is that of T2, the caller knows the
    twin's. No rows where neurons are no product or no pair has a twin.
    """
    harmful, harmless = caches.get("T2"), caches.get("T2b")
    if harmful is None or harmless is None:
        return pd.DataFrame()
    row = {pair.pair.id: i for i, pair in enumerate(harmless.batch.pairs)}
    at = [(i, row[twin_of[id]]) for i, pair in enumerate(harmful.batch.pairs) if twin_of.get(id := pair.pair.id) in row]
    own, twin = harmful.only([i for i, _ in at]), harmless.only([j for _, j in at])
    if not at or own.factors is None or twin.factors is None:
        return pd.DataFrame()
    roles: dict[str, dict[NeuronSet, list[Tensor]]] = {WRAPPER_HARM: {}, HARM_WRAPPER: {}}
    for one in sets:
        off, on, without = (factor.at((slice(None), list(one.neurons))) for factor in (*own.factors, twin.factors[1]))
        roles[WRAPPER_HARM][one] = crossed((off.gate, on.gate), (without.up, on.up), on.act)
        roles[HARM_WRAPPER][one] = crossed((without.gate, on.gate), (off.up, on.up), on.act)
    rows = list[Rows]()
    for form, crossings in roles.items():
        rows += clamped_products(subject, own.batch, openers["T2"], form, crossings)
    return table_of(rows).assign(treatment="T2-T2b")


@dataclass(frozen=True)
class GateForm:
    """A form of the index on one set; `rank` is what is chosen by on discover: no readouts first, then the larger index."""

    form: str
    experiment: str
    set_name: str
    treatment: str
    main: GateIndex
    variants: Mapping[str, GateIndex]
    rank: tuple[bool, float]


def sets_of(study: Study, table: pd.DataFrame, treatment: str) -> dict[str, NeuronSet]:
    """The sparse set by discover of every layer that has effects and enough neurons measured; and the whole last layer."""
    d_mlp, last = study.subject.d_mlp, study.subject.n_layers - 1
    size = min(d_mlp, few_neurons(d_mlp))
    rows = table[(table.treatment == treatment) & (table.split == "discover")]
    rows = rows[rows.layer.isin(study.thinned_layers)] if study.is_quick else rows
    layers = rows.assign(moves=(rows.nie0 != 0) | (rows.nie1 != 0)).groupby("layer")["moves"].agg(["size", "any"])
    found = {}
    for layer in layers.index[layers["any"] & (layers["size"] >= size)].tolist():
        name = LAST if layer == last else f"layer {layer}"
        found[name] = NeuronSet(name, layer, tuple(ranking(table, treatment, layer)[:size].tolist()))
    if LAST in found:
        found[WHOLE] = NeuronSet(WHOLE, last, tuple(range(d_mlp)))
    return found


def gate_forms(cells: pd.DataFrame, sets: dict[str, NeuronSet], primary: str) -> tuple[GateForm, ...]:
    """Every form on the sets that it is for, and each benign behaviour's own set in forms a and b."""
    found = [_gate_form(cells, form, name, primary) for form in FORMS if form != "below" for name in (LAST, WHOLE)]
    lower = [one for name in sets if name not in (LAST, WHOLE) and (one := _gate_form(cells, "below", name, primary))]
    best = max(lower, key=lambda one: (one.main.is_defined, *one.rank), default=None)
    benign = sorted(name for name in set(cells.treatment) if name.startswith("B"))
    own = [_gate_form(cells, form, f"own {name}", name) for form in ("upstream", "inside") for name in benign]
    return tuple(one for one in (*found, best, *own) if one is not None)


def _gate_form(cells: pd.DataFrame, form: str, name: str, treatment: str) -> GateForm | None:
    experiment = "upstream" if form == "below" else form
    parts = {label: select(cells, treatment, name, experiment, outcome) for label, outcome in VARIANTS.items()}
    found = {label: index for label, part in parts.items() if (index := gate_index(part)) is not None}
    main = found.pop("main", None)
    if main is None:
        return None
    discover = parts["main"][parts["main"].split == "discover"]
    size = abs(interaction(discover).sum() / (discover.y11 - discover.y00).sum())
    readout = readout_share(cells, treatment, name, "discover")
    is_no_readout = readout is not None and bool(readout.estimate[0] < READOUT)
    return GateForm(FORMS[form][0], form, name, treatment, main, found, (is_no_readout, float(size)))


# ---- for pictures and tables ----

# Quantity in the evidence, its test, what counts as passed, what it can show, what it cannot.
TESTS = (
    ("gate index", "i factorial", f"low >= {GATE_LOW}, sign of an AND", "that signal and set act only together",
     "which of the two is the gate, nor a gate for a signal that the pairs do not switch"),
    ("benign share", "ii specificity", f"high <= {BENIGN_SHARE:.2f}", "that the set does little in benign decisions",
     "that it does nothing else: only these behaviours were tried"),
    ("perplexity ratio", "ii specificity", f"high <= {PERPLEXITY}", "that closing it spares benign answers",
     "how it acts on other text; closed values come from other prompts"),
    ("timing share", "iii timing", "reported", "whether acting once, at the first answer token, is enough",
     "a switch that the model was not free to lack: here the opener decides the answer"),
    ("readout share", "iv readout", f"high < {READOUT}", "how much of the effect the set writes into the logits itself",
     "anything about the last layer, where it is near 1 whatever was learned"),
)  # fmt: skip
SETS = {"main": "set of the verdict", "last layer": "sparse set of the last layer"}


def gate_tests(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a test and set: number, interval, whether it passes, what it can and cannot show. From rows of C5b."""
    made = []
    for quantity, test, rule, can, cannot in TESTS:
        for one in rows[(rows.quantity == quantity) & rows.variant.isin(list(SETS))].itertuples():
            signed = rows[(rows.quantity == f"{quantity}, signed") & (rows.variant == one.variant)]
            low, high = one.ci_low, one.ci_high
            passes = {
                "gate index": low >= GATE_LOW and len(signed) > 0 and bool((signed.ci_low > 0).all()),
                "benign share": high <= BENIGN_SHARE, "perplexity ratio": high <= PERPLEXITY, "readout share": high < READOUT,
            }  # fmt: skip
            state = {True: "passes", False: "does not pass", None: "reported"}[passes.get(quantity)]
            numbers = (one.estimate, low, high)
            made.append((f"{test}: {quantity}", SETS[str(one.variant)], *numbers, rule, state, can, cannot, one.note))
    names = ["test", "set", "estimate", "low", "high", "rule", "state", "can show", "cannot show", "note"]
    return pd.DataFrame(made, columns=names)
