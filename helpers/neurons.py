"""Single neurons and sets of them: what each does to the answer, how few carry an effect, what an index means, what gates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from operator import eq

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.display import NotDefined, passes_on
from companion.base.files import EVIDENCE, write_table
from companion.base.paths import results_dir
from companion.base.thresholds import few_neurons
from companion.evidence import neurons as evidence
from companion.evidence.neurons import Gates, Neurons, all_curves, measure_gates, measure_neurons
from companion.mediation.estimands import CELLS, run_clean
from companion.mediation.study import Study, control_study, other_shipped
from companion.mediation.summaries import cell_means
from companion.model.activations import on_input as edit_input
from companion.model.architecture import written_vectors
from companion.model.readout import norm_gain
from companion.neurons import adjacency, clamping, gating, screening, sets, single
from companion.neurons.adjacency import morans_i
from companion.neurons.gating import gate_tests
from companion.neurons.single import PairEffects
from companion.prompts.pairs import Pair, shown
from companion.prompts.tokens import TokenPair

__all__ = ["all_curves", "common_words", "curve_table", "edit_input", "fires_on", "four_cells", "gate_and_up", "gate_cells",
           "gate_tests", "gradient_estimates", "indices", "joint_effects", "measure_gates", "measure_neurons", "moran",
           "morans_i", "norm_gain", "settled", "strongest", "write_evidence", "write_gate_evidence",
           "written_vectors"]  # fmt: skip

KINDS = {("T2b", 0): "harmless, neutral wrapper", ("T2b", 1): "harmless, jailbreak wrapper",
         ("T2", 0): "harmful, neutral wrapper", ("T2", 1): "harmful, jailbreak wrapper"}  # fmt: skip
COMMON = 20_000  # tokens that a vocabulary of merges made first are common words


def common_words(study: Study) -> Int[np.ndarray, "word"]:
    """Tokens that are common whole words: letters only, three or more, behind a space where the vocabulary has spaces."""
    tokenizer, n = study.subject.tokenizer, min(COMMON, len(study.subject.unembedding[0]))
    assert tokenizer is not None
    texts = [tokenizer.decode([token]) for token in range(n)]
    is_word = np.array([text.strip().isascii() and text.strip().isalpha() and len(text.strip()) > 2 for text in texts])
    behind_space = np.array([text.startswith(" ") for text in texts])
    return np.flatnonzero(is_word & (behind_space | (not behind_space[is_word].any())))


def strongest(found: Neurons, n: int = 12) -> pd.DataFrame:
    """The `n` last-layer neurons of the largest |effect| on discover, as shares of TE on test.

    Columns: neuron, nie0, nie1, their mean (`estimate`) with its interval, q_value, and whether the neuron passes the test.
    """
    rows = found.table[(found.table.treatment == found.primary) & (found.table.split == "test")]
    ranked = single.ranking(found.table, found.primary, found.measured.last)
    rows = rows[rows.layer == found.measured.last].set_index("neuron").loc[ranked[:n]].reset_index()
    middle = (rows.nie0 + rows.nie1) / 2
    shares = {"nie0": rows.nie0, "nie1": rows.nie1, "estimate": middle, "low": rows.ci_low, "high": rows.ci_high}
    made = pd.DataFrame(shares) / (rows.te.iloc[0] or 1.0)
    return made.assign(neuron=rows.neuron, q_value=rows.q_value, passes=single.passing(rows))


def fires_on(found: Neurons, members: Int[np.ndarray, "neuron"]) -> pd.DataFrame:
    """Each neuron's value at the last token of every T2 and T2b prompt of test: columns neuron, kind, value, prompt."""
    parts, study = [], found.measured.study
    pairs = {one.pair.id: one.pair for one in study.pairs}
    for name, whole in found.measured.states.items():
        states = whole.only((whole.pairs.split == "test").to_numpy())
        for side, label in enumerate(("control", "treated")):
            texts = [shown(pairs[i], label) for i in states.pairs.pair_id]
            kind = KINDS.get((name, side), f"{name}, {label}")
            for neuron in members if name in ("T2", "T2b") or not study.of("T2") else ():
                values = states.neurons[side][:, int(neuron)].tolist()
                parts.append(pd.DataFrame({"neuron": neuron, "kind": kind, "value": values, "prompt": texts}))
    return pd.concat(parts, ignore_index=True)


def gradient_estimates(study: Study, pair: TokenPair) -> Float[Tensor, "layer neuron"]:
    """The gradient's estimate of every neuron's NIE0 at the last token of one pair, in log-odds."""
    batch = run_clean(study.subject, [pair])
    y1 = partial(screening.log_odds, study.subject, study.openers[pair.pair.treatment])
    return screening.attribution(study.subject, batch.control, batch.treated, y1)[0]


def joint_effects(
    found: Neurons, treatment: str, order: Int[np.ndarray, "neuron"], sizes: Int[np.ndarray, "size"]
) -> Float[np.ndarray, "pair size"]:
    """NIE0 of the first k last-layer neurons of an order together, on test pairs, for some k (increasing), in log-odds."""
    apply = partial(sets.cumulative, found.measured.study.subject, order=order, ks=sizes)
    return sets.on_contrast(found.measured, treatment, "test", apply).values["nie0"]


@passes_on
def curve_table(made: Mapping[str, PairEffects], of: str) -> pd.DataFrame | NotDefined:
    """Ranked and random order as shares of the whole layer's effect, with intervals over topics: series, k, estimate, ...

    `k90` is that of the series, NaN where no k settles; `of` names the treatment.
    """
    names = {"main": "largest first", "random order": "random order"}
    curves = {label: (sets.curve_shares(made[name]), _k90(made[name])) for name, label in names.items()}
    table = pd.concat([shares.assign(series=label, k90=k90.get("estimate")) for label, (shares, k90) in curves.items()])
    if table.empty:
        return NotDefined("The last MLP as a whole works against the treatment: no share of it is defined.")
    return table.astype({"k90": float}).assign(of=of)


def _k90(curve: PairEffects) -> dict[str, float]:
    """k90 of a curve with its interval over topics: estimate, low, high; empty where no k settles."""
    found, at = sets.curve_summary(curve), sets.SUMMARY.index("k90")
    ends = {"estimate": found.estimate[at], "low": found.low[at], "high": found.high[at]}
    return ends if ends["estimate"] <= curve.columns["k"].max() else {}


@passes_on
def settled(made: Mapping[str, PairEffects], study: Study) -> pd.DataFrame | NotDefined:
    """k90 of harm and of each benign behaviour with intervals over topics; without those where no k settles.

    `words` says between what a behaviour chooses, `few` how many neurons C5a allows.
    """
    few, rows = few_neurons(study.subject.d_mlp), []
    for name, curve in made.items():
        if name != "random order" and (k90 := _k90(curve)):
            own = ("harm", "refuse or answer") if name == "main" else (name, _choice(study.of(name)[0].pair))
            rows.append({"behaviour": own[0], "words": own[1], "quantity": "k90", **k90, "few": few})
    return pd.DataFrame(rows) if rows else NotDefined("No curve settles: every layer works against its behaviour.")


def _choice(pair: Pair) -> str:
    """Between what a behaviour chooses, in the words in which a pair's prompts differ; empty where these are hidden."""
    sides = [shown(pair, side).split() for side in ("control", "treated")]
    start, end = (sum(takewhile(bool, map(eq, *both))) for both in (sides, [side[::-1] for side in sides]))
    one, other = (" ".join(side[start : len(side) - end]).strip(".,?!") for side in sides)
    return "" if pair.sensitive else f'"{one}" or "{other}"'


def moran(found: Neurons) -> pd.DataFrame | NotDefined:
    """Moran's I of 9,999 random orders as a histogram, with the model's own (`observed`) and its interval in every row.

    The values are the neurons' ranks by |effect| on test, pooled over the layers that were measured completely.
    """
    is_enough = evidence.enough(found, found.primary)
    return adjacency.moran_histogram(evidence.moran(found)) if is_enough else evidence.NOTHING


def write_evidence(
    study: Study, found: Neurons, made: Mapping[str, PairEffects] | NotDefined, model: str, profile: str
) -> pd.DataFrame:
    """The rows that C5a and C7 rest on, of this model and of its shipped relatives: `04_evidence.csv`.

    `04_neurons.parquet` holds the neurons of all these models, which notebook 04b reads.
    """
    rows, tables = evidence.evidence_c5a(found, study.slug, made), [found.table.assign(model=study.slug)]
    if evidence.enough(found, found.primary):
        rows += evidence.evidence_c7(found, study.slug, evidence.moran(found), evidence.groups(found))
    for name in other_shipped(model, profile):
        swept = evidence.measure_last_layer(control_study(study, model, name))
        rows += evidence.neuron_evidence(swept, name)
        tables += [] if swept is None else [swept.table.assign(model=name)]
    write_table(pd.concat(tables, ignore_index=True), results_dir(study.slug) / "04_neurons.parquet")
    table = pd.DataFrame(rows, columns=list(EVIDENCE))
    write_table(table, results_dir(study.slug) / "04_evidence.csv")
    return table


# ---- gates ----


def four_cells(study: Study, pair: TokenPair, members: list[int], outcome: str = "Y1") -> list[float]:
    """y00, y01, y10, y11 of one pair: the first digit is the prompt, the second the neurons' values; in log-odds."""
    one = clamping.NeuronSet("set", study.subject.n_layers - 1, tuple(members))
    table = clamping.four_cells(study.subject, [pair], study.openers, [one])
    cells = gating.select(table, pair.pair.treatment, "set", "upstream", outcome)
    return [float(value) for value in cells[list(CELLS)].to_numpy()[0]]


def gate_and_up(study: Study, pair: TokenPair, neuron: int) -> pd.DataFrame | NotDefined:
    """A last-layer neuron's value with its gate from either run (rows) and its up from either run (columns)."""
    factors = clamping.product(study.subject, run_clean(study.subject, [pair]), study.subject.n_layers - 1)
    if factors is None:
        return NotDefined("The neurons of this family are no product of a gate and an up projection.")
    values = [[float(g.act(g.gate[0, neuron]) * u.up[0, neuron]) for u in factors] for g in factors]
    return pd.DataFrame(values, ["gate: control", "gate: treated"], ["up: control", "up: treated"])


@passes_on
def gate_cells(gates: Gates) -> pd.DataFrame:
    """Mean outcome of the four cells against both switches off, on test: a panel a form; log-odds with intervals."""
    parts = []
    for one in (form for form in gates.forms if form.treatment == gates.primary and form.set_name != gating.WHOLE):
        experiment = "upstream" if one.experiment == "below" else one.experiment
        cells = gating.select(gates.cells, gates.primary, one.set_name, experiment, "Y1", "test")
        for name in CELLS:
            change = cells.assign(nie=cells[name] - cells[CELLS[0]], first=name[1], second=name[2])
            mean = cell_means(change, by=["first", "second"])
            parts.append(mean.assign(form=gating.FORMS[one.experiment]).astype({"first": int, "second": int}))
    return pd.concat(parts)[["form", "first", "second", "estimate", "low", "high"]]


def indices(rows: pd.DataFrame) -> pd.DataFrame | NotDefined:
    """The signed gate index by form; of benign behaviours the defined ones inside neurons: form, state, estimate, ..."""
    found = rows[rows.quantity == "gate index, form, signed"]
    found = found[~found.variant.str.contains("frozen|read-out|whole layer")]
    defined, benign = ~found.note.str.startswith("not defined"), found.variant.str.contains(r" B\d+$")
    found = found.assign(state=np.where(defined, "enough at stake", "too little at stake"), form=found.variant)
    found = found[~benign | (defined & found.variant.str.startswith("b:"))]
    table = found.assign(low=found.ci_low, high=found.ci_high)[["form", "state", "estimate", "low", "high"]]
    return table if len(table) else NotDefined("No form of the gate index was measured.")


def write_gate_evidence(
    study: Study, neurons: pd.DataFrame, gates: Gates | NotDefined, model: str, profile: str
) -> pd.DataFrame:
    """The rows that C5b rests on, of this model and of its shipped relatives (last layer alone): `04b_evidence.csv`."""
    rows = evidence.evidence_c5b(gates, study.slug)
    for name in other_shipped(model, profile):
        quick = evidence.quick_study(control_study(study, model, name))
        rows += evidence.gating_evidence(quick, neurons[neurons.model == name], name)
    table = pd.DataFrame(rows, columns=list(EVIDENCE))
    write_table(table, results_dir(study.slug) / "04b_evidence.csv")
    return table
