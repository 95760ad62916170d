"""Tables behind the pictures of the neuron notebook: one neuron's geometry, windows against single neurons, curves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import neuron_curves, outcomes
from helpers.grid_patch import projection
from helpers.mediation import Batch
from helpers.neuron_adjacency import HALF_WIDTH, Adjacency, windows
from helpers.neuron_sets import Measured, joint, on_contrast
from helpers.neurons import PairEffects
from helpers.readout import is_centred, norm_gain
from helpers.subject import Subject
from helpers.subject_parts import written_vectors
from helpers.tokens import Openers


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
    camps = outcomes.camp_weights(subject, control.to(subject.dtype), treated.to(subject.dtype), openers)
    tokens = (list(openers.comply), list(openers.refuse))
    comply, refuse = (w @ subject.unembedding[0][ids].double() for w, ids in zip(camps, tokens, strict=True))
    base, write = (_centred(subject, x) for x in (control, change * vector))
    along = base / base.norm()
    across = write - (write @ along) * along
    plane = torch.stack([along, across / across.norm().clamp(min=1e-30)])
    here, step, reads = (plane @ x / base.norm() for x in (base, write, gain * (comply - refuse)))
    moved, reads = here + step, here + 0.25 * reads / reads.norm()
    ends = {"normed, control": here, "normed, after": moved / moved.norm()}
    rows = [
        ("sphere", 0, 0, 1, 0),
        ("residual stream", 0, 0, *here.tolist()),
        ("neuron's write", *here.tolist(), *moved.tolist()),
        ("after the write", 0, 0, *moved.tolist()),
        ("read-out direction", *here.tolist(), *reads.tolist()),
        *((name, *point.tolist(), *point.tolist()) for name, point in ends.items()),
    ]
    return pd.DataFrame(rows, columns=["item", "x", "y", "to_x", "to_y"]).astype(
        dict.fromkeys(("x", "y", "to_x", "to_y"), float)
    )


def _centred(subject: Subject, x: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    return x - x.mean() if is_centred(subject.final_norm) else x


def windows_and_singles(
    measured: Measured, treatment: str, names: Int[np.ndarray, "neuron"], label: str, half_width: int = HALF_WIDTH
) -> pd.DataFrame:
    """Share of TE on test of every last-layer neuron alone and of the window around it (NaN where it would not fit).

    `names` are the neurons' original indices, `label` says which order this is.
    """
    subject, n = measured.study.subject, measured.study.subject.d_mlp
    groups = windows(np.arange(n), half_width)
    both = [
        on_contrast(measured, treatment, "test", lambda ends, g=members: joint(subject, ends, g))  # type: ignore[misc]
        for members in (np.arange(n)[:, None], groups)
    ]
    single, around = (made.nie.mean(0) / made.pairs.te.mean() for made in both)
    window = np.full(n, np.nan)
    window[half_width : half_width + len(groups)] = around
    return pd.DataFrame({"order": label, "place": np.arange(n), "name": names, "single": single, "window": window})


def histogram(found: Adjacency, n_bins: int = 50) -> pd.DataFrame:
    """Moran's I under permuted indices, binned; the model's own estimate and interval repeated in every row."""
    counts, edges = np.histogram(found.permuted, bins=n_bins)
    own = {"observed": found.estimate, "least": found.low, "most": found.high}
    return pd.DataFrame({"start": edges[:-1], "end": edges[1:], "count": counts}).assign(**own)


def curve_table(made: Mapping[str, PairEffects]) -> pd.DataFrame:
    """Curves to draw: harm in both directions against a random order, and against the benign behaviours."""
    ks = neuron_curves.plotted(next(iter(made.values())).columns["k"].to_numpy())
    wanted = [
        ("both directions", "sufficiency (NIE0)", "main", "nie0"),
        ("both directions", "necessity (NIE1)", "main", "nie1"),
        ("both directions", "random order, mean", "random order", "nie"),
        ("both directions", "ranked by sign, mean", "ranked by sign", "nie"),
        ("against benign behaviours", "harm, mean", "main", "nie"),
        *(("against benign behaviours", name, name, "nie") for name in made if name.startswith("B")),
    ]
    parts = [
        neuron_curves.curve_shares(made[name], value, ks).assign(panel=panel, series=series)
        for panel, series, name, value in wanted[:12]
        if name in made
    ]
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
