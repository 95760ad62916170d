"""A table for every figure, and what a figure shows as numbers."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from companion.plots import layers, style
from companion.plots.figures import SPECS, spec_of
from companion.plots.style import FigureSpec

NAMES = [entry.name for entry in SPECS]
CHOICES = {
    "model": ["embedded", "embedded (untrained)"], "site": ["attn_out", "mlp_out"], "treatment": ["T1", "T2", "T2b", "T2-T2b"],
    "effect": ["indirect", "direct"], "contrast": ["harm", "benign", "difference"], "answer": [*style.ANSWERS, "not testable"],
    "claim": ["C1", "C2", "C3"], "group": list(layers.GROUP_COLOURS), "layer": range(6), "head": range(4),
    "position": range(10), "place": range(12), "k": [1, 2, 5], "panel": ["one", "two"], "series": ["one", "two"],
    "split": ["discover", "validate", "test"], "differ": [False, True], "quantity": ["k50", "k90"], "role": ["random", "fitted"],
    "error": ["false supported", "false contradicted"], "kind": ["early", "middle"], "what": ["components", "neurons"],
}  # fmt: skip


def table_for(entry: FigureSpec, seed: int = 0) -> pd.DataFrame:
    """All combinations of what a figure distinguishes, with estimates inside their intervals."""
    rng = np.random.default_rng(seed)
    crossed = [name for name in entry.columns if name in CHOICES]
    if {"position", "group"} <= set(crossed):
        crossed = ["position"]  # the token drawing: one row a position
    if {"answer", "model"} <= set(crossed):
        crossed = ["model", "claim"]
    values = [CHOICES[name] for name in crossed] or [range(5)]
    made = pd.MultiIndex.from_product(values, names=crossed or ["row"]).to_frame(index=False)
    for name, kind in entry.columns.items():
        if name in made or name in ("estimate", "low", "high", "band_low", "band_high"):
            continue
        usual = {"str": [f"{name} {i}" for i in range(4)], "bool": [True, False]}
        options = list(CHOICES.get(name, usual.get(kind, [3])))
        made[name] = [options[i % len(options)] for i in range(len(made))]
    if "estimate" in entry.columns:
        made["estimate"] = rng.normal(size=len(made))
        made["low"], made["high"] = (made.estimate + sign * rng.uniform(0.1, 0.5, len(made)) for sign in (-1, 1))
        made["band_low"], made["band_high"] = made.low - 0.2, made.high + 0.2
    return made[list(entry.columns)]


def numbers(figure: Figure) -> set[float]:
    """Every coordinate that an axis of the figure shows, as data."""
    found: set[float] = set()
    for ax in figure.axes:
        for line in ax.get_lines():
            found |= {*np.ravel(line.get_xdata()), *np.ravel(line.get_ydata())}
        for collection in ax.collections:
            for path in collection.get_paths():
                found |= set(np.ravel(path.vertices))
        for image in ax.images:
            found |= set(np.ravel(np.ma.filled(image.get_array(), np.nan)))
    return {round(float(x), 9) for x in found if np.isfinite(float(x))}


def drawn(name: str, table: pd.DataFrame | None = None) -> Figure:
    with style.theme():
        return spec_of(name).draw(table_for(spec_of(name)) if table is None else table)
