"""Tables behind the pictures of the neuron notebook: one neuron's geometry, windows against single neurons, curves, gates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from companion.base.thresholds import BENIGN_SHARE, GATE_LOW, PERPLEXITY, READOUT
from companion.mediation import outcomes
from companion.mediation.estimands import Batch
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import projection
from companion.model.readout import is_centred, norm_gain
from companion.neurons import sparsity
from companion.neurons.adjacency import HALF_WIDTH, MoranTest, windows
from companion.neurons.gating import LEAST
from companion.neurons.sets import Measured, joint, on_contrast
from companion.neurons.single import PairEffects
from companion.prompts.tokens import Openers


def geometry(subject: Subject, batch: Batch, neuron: int, openers: Openers) -> pd.DataFrame:
    """Arrows and points in the plane of the control run's final residual stream and one neuron's write (first pair).

    The unit is the length of the control run's residual stream, the sphere's radius: the final norm (before its gain)
    brings every vector to one length. The read-out direction is the gain times the difference of the camps' unembedding
    vectors, weighted as the two runs weigh the openers; only its direction is meant.
    """
    control, treated = (run.resid_post[-1][0, -1].double() for run in (batch.control, batch.treated))
    vector = written_vectors(projection(subject.layers[-1], "neuron"))[neuron].double()
    change = (batch.treated.neurons[-1] - batch.control.neurons[-1])[0, -1, neuron].double()
    gain = norm_gain(subject.final_norm)[0].double()
    camps = outcomes.opener_weights(subject, control.to(subject.dtype), treated.to(subject.dtype), openers)
    tokens = (list(openers.comply), list(openers.refuse))
    comply, refuse = (w @ subject.unembedding[0][ids].double() for w, ids in zip(camps, tokens, strict=True))
    base, write = (x - x.mean() if is_centred(subject.final_norm) else x for x in (control, change * vector))
    along = base / base.norm()
    across = write - (write @ along) * along
    plane = torch.stack([along, across / across.norm().clamp(min=1e-30)])
    here, step, reads = (plane @ x / base.norm() for x in (base, write, gain * (comply - refuse)))
    moved, reads = here + step, here + 0.25 * reads / reads.norm()
    rows = [
        ("sphere", 0, 0, 1, 0),
        ("residual stream", 0, 0, *here.tolist()),
        ("neuron's write", *here.tolist(), *moved.tolist()),
        ("after the write", 0, 0, *moved.tolist()),
        ("read-out direction", *here.tolist(), *reads.tolist()),
        ("normed, control", *here.tolist(), *here.tolist()),
        ("normed, after", *(moved / moved.norm()).tolist(), *(moved / moved.norm()).tolist()),
    ]
    ends = ["x", "y", "to_x", "to_y"]
    return pd.DataFrame(rows, columns=["item", *ends]).astype(dict.fromkeys(ends, float))


def windows_and_singles(
    measured: Measured, treatment: str, names: Int[np.ndarray, "neuron"], label: str, half_width: int = HALF_WIDTH
) -> pd.DataFrame:
    """Share of TE on test of every last-layer neuron alone and of the window around it (NaN where it would not fit).

    `names` are the neurons' original indices, `label` says which order this is.
    """
    subject, n = measured.study.subject, measured.study.subject.d_mlp
    groups = windows(np.arange(n), half_width)
    shares = []
    for members in (np.arange(n)[:, None], groups):
        made = on_contrast(measured, treatment, "test", partial(joint, subject, members=members))
        shares.append(made.nie.mean(0) / made.pairs.te.mean())
    single, around = shares
    window = np.full(n, np.nan)
    window[half_width : half_width + len(groups)] = around
    return pd.DataFrame({"order": label, "place": np.arange(n), "name": names, "single": single, "window": window})


def moran_histogram(found: MoranTest, n_bins: int = 50) -> pd.DataFrame:
    """Moran's I under permuted indices, binned; the model's own estimate and interval repeated in every row."""
    counts, edges = np.histogram(found.permuted, bins=n_bins)
    own = {"observed": found.estimate, "least": found.low, "most": found.high}
    return pd.DataFrame({"start": edges[:-1], "end": edges[1:], "count": counts}).assign(**own)


def curve_table(made: Mapping[str, PairEffects]) -> pd.DataFrame:
    """Curves to draw: harm in both directions against a random order, and against the benign behaviours."""
    every = next(iter(made.values())).columns["k"].to_numpy()
    # Some set sizes, evenly spaced on a logarithmic axis, are enough to draw a curve.
    ks = np.unique(every[np.searchsorted(every, np.geomspace(1, every[-1], 40)).clip(max=len(every) - 1)])
    wanted = [
        ("both directions", "sufficiency (NIE0)", "main", "nie0"),
        ("both directions", "necessity (NIE1)", "main", "nie1"),
        ("both directions", "random order, mean", "random order", "nie"),
        ("both directions", "ranked by sign, mean", "ranked by sign", "nie"),
        ("against benign behaviours", "harm, mean", "main", "nie"),
        *(("against benign behaviours", name, name, "nie") for name in made if name.startswith("B")),
    ]
    parts = [
        sparsity.curve_shares(made[name], value, ks).assign(panel=panel, series=series)
        for panel, series, name, value in wanted[:12]
        if name in made
    ]
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)


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
        found = rows[(rows.quantity == quantity) & rows.variant.isin(list(SETS))]
        for one in found.itertuples():
            signed = rows[(rows.quantity == f"{quantity}, signed") & (rows.variant == one.variant)]
            low, high = one.ci_low, one.ci_high
            passes = {
                "gate index": low >= GATE_LOW and len(signed) > 0 and bool((signed.ci_low > 0).all()),
                "benign share": high <= BENIGN_SHARE,
                "perplexity ratio": high <= PERPLEXITY,
                "readout share": high < READOUT,
            }
            state = {True: "passes", False: "does not pass", None: "reported"}[passes.get(quantity)]
            numbers = (one.estimate, low, high)
            made.append((f"{test}: {quantity}", SETS[str(one.variant)], *numbers, rule, state, can, cannot, one.note))
    names = ["test", "set", "estimate", "low", "high", "rule", "state", "can show", "cannot show", "note"]
    return pd.DataFrame(made, columns=names)


def index_forms(rows: pd.DataFrame) -> pd.DataFrame:
    """The signed index of every form that is defined, by what the outcome is: log-odds, norm frozen, linear read-out."""
    found = rows[(rows.quantity == "gate index, form, signed") & ~rows.note.str.startswith("not defined")]
    outcome = found.variant.str.extract(", (norm frozen|linear read-out)$")[0].fillna("log-odds")
    variant = found.variant.str.replace(", (norm frozen|linear read-out)$", "", regex=True)
    table = found.assign(form=variant, outcome=outcome, low=found.ci_low, high=found.ci_high)
    is_benign = variant.str.contains(r" B\d+$")
    table = table.assign(order=is_benign.map({False: "0 ", True: "1 "}) + variant).sort_values("order", kind="stable")
    return table[["form", "outcome", "estimate", "low", "high", "note"]].reset_index(drop=True)


def undefined_forms(rows: pd.DataFrame) -> list[str]:
    """Forms of which too little is at stake on discover (less than 0.2 of TE), or whose set takes no part."""
    found = rows[(rows.quantity == "gate index, form") & rows.note.str.startswith("not defined")]
    plain = found[~found.variant.str.contains("frozen|read-out")]
    return [f"{name} (less than {LEAST} of TE)" for name in plain.variant]


def gate_drawing() -> pd.DataFrame:
    """Where a network can multiply: boxes and arrows of two panels; columns: panel, kind, x, y, to_x, to_y, text, colour."""
    last, inside = "Between last-layer neurons: only +", "Inside one neuron: gate x up"
    boxes = [
        (last, 0.0, 1.0, "everything\nupstream", "grey"), (last, 0.0, 0.0, "the set\na_j w_j", "orange"),
        (last, 1.6, 0.5, "+", "blue"), (last, 2.6, 0.5, "norm", "grey"), (last, 3.6, 0.5, "logits", "grey"),
        (inside, 0.0, 1.0, "gate\nprojection", "orange"), (inside, 0.0, 0.0, "up\nprojection", "grey"),
        (inside, 1.6, 0.5, "x", "blue"), (inside, 2.6, 0.5, "w_j", "grey"), (inside, 3.6, 0.5, "+", "grey"),
    ]  # fmt: skip
    made = [(panel, "box", x, y, x, y, text, colour) for panel, x, y, text, colour in boxes]
    for panel in (last, inside):
        for x, y, to_x, to_y in ((0, 1, 1.6, 0.5), (0, 0, 1.6, 0.5), (1.6, 0.5, 2.6, 0.5), (2.6, 0.5, 3.6, 0.5)):
            made.append((panel, "arrow", float(x), float(y), to_x, to_y, "", "grey"))
    return pd.DataFrame(made, columns=["panel", "kind", "x", "y", "to_x", "to_y", "text", "colour"])
