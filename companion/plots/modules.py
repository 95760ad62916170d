"""Figures of notebook 03: what passes through attention and MLPs and what they write, the heads, and where those look."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from companion.plots import style
from companion.plots.layers import PANELS, layer_map
from companion.plots.style import ESTIMATE, LOG_ODDS, distinct, spec


def heads(table: pd.DataFrame) -> Figure:
    """Heads by layer, indirect above direct on one scale; `carries` frames a head.

    A dot marks an interval that excludes 0, where the colour can be told from 0.
    """
    effects, bound = distinct(table.effect), float(table.estimate.abs().max()) or 1.0
    n_heads = table["head"].nunique()
    figure, axes = style.new_figure(len(effects), 1, 7.2, 0.6 + len(effects) * (0.55 + 0.13 * n_heads), sharex=True)
    for ax, effect in zip(axes[:, 0], effects, strict=True):
        part = table[table.effect == effect]
        grid = part.pivot(index="head", columns="layer", values="estimate")
        image = ax.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
        ax.set_yticks(range(n_heads), grid.index, fontsize=8)
        ax.grid(False)
        places = {name: {value: i for i, value in enumerate(getattr(grid, name))} for name in ("columns", "index")}
        x, y = part.layer.map(places["columns"]), part["head"].map(places["index"])
        sure = ((part.low > 0) | (part.high < 0)) & (part.estimate.abs() > bound / 20)
        ax.plot(x[sure], y[sure], ".", color="black", ms=2.5)
        for left, top in zip(x[part.carries], y[part.carries], strict=True):
            ax.add_patch(Rectangle((left - 0.5, top - 0.5), 1, 1, fill=False, ec="black", lw=1.4))
        ax.set_ylabel("head")
        ax.set_title(PANELS.get(effect, effect), fontsize=9, fontweight="normal")
    axes[-1, 0].set_xticks(range(grid.shape[1]), grid.columns, fontsize=7)
    axes[-1, 0].set_xlabel("layer")
    figure.colorbar(image, ax=axes[:, 0], label=LOG_ODDS, pad=0.01)
    style.heading(figure, "Which heads does the effect pass through, and do they write it? (framed: looked at below)")
    return figure


def patterns(table: pd.DataFrame) -> Figure:
    """Where the last token looks, head by token, one panel a prompt; numbers from 0.05 on."""
    names, bound = distinct(table.panel), float(table.weight.max()) or 1.0
    n_tokens, n_heads = table.position.nunique(), table["head"].nunique()
    height = len(names) * (0.24 * n_heads + 1.15) + 0.4
    figure, axes = style.new_figure(len(names), 1, max(5.0, 0.3 * n_tokens + 1.2), height)
    for ax, name in zip(axes[:, 0], names, strict=True):
        part = table[table.panel == name]
        grid = part.pivot(index="head", columns="position", values="weight").loc[distinct(part["head"])]
        image = ax.imshow(grid, cmap="Blues", vmin=0.0, vmax=bound, aspect="auto")
        ax.set_yticks(range(len(grid)), grid.index, fontsize=8)
        ax.grid(False)
        for (y, x), weight in np.ndenumerate(grid.to_numpy()):
            if weight >= 0.05:
                style.write_cell(ax, x, y, f"{weight:.2f}"[1:] if weight < 0.995 else "1", weight / bound)
        tokens = part.drop_duplicates("position").sort_values("position").token
        ax.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        ax.set_title(name, fontsize=9)
        ax.set_ylabel("layer.head")
    figure.colorbar(image, ax=axes[:, 0], label="share of the head's attention", pad=0.01)
    style.heading(figure, "Which words do the carrying heads read for the last token?")
    return figure


# fmt: off
SPECS = (
    spec("03_total_direct", layer_map, "C2", {"effect": "str", "site": "str", "layer": "int", **ESTIMATE},
         "Two maps of attention and MLP by layer, above what passes through each (indirect effects), below what each "
         "writes itself (direct effects), as percent of the total effect; bold numbers have an interval that excludes 0",
         panel="effect", title="Through which modules does the decision pass, and which write it? (percent of TE)"),
    spec("03_normalised", style.dots, "C2", {"normalisation": "str", "effect": "str", **ESTIMATE},
         "MLP share of direct and of indirect effects: raw, per unit of patch norm, per parameter, and of the indirect "
         "ones by sufficiency and by necessity; dashed lines mark one half and 0.60",
         row="normalisation", group="effect", title="Do MLPs hold more than attention, however one counts?",
         unit="MLP share of positive component effects\n(dashed: C2 is denied below 0.5 and holds above 0.6)",
         marks=(0.5, 0.6), limits=(0.0, 1.0)),
    spec("03_heads", heads, "C2", {"layer": "int", "head": "int", "effect": "str", "carries": "bool", **ESTIMATE},
         "Two maps of attention heads by layer, indirect effects above direct ones on one scale from against to with "
         "the treatment; a dot marks an interval that excludes 0, a frame the heads whose attention is looked at"),
    spec("03_patterns", patterns, "C2",
         {"panel": "str", "head": "str", "position": "int", "token": "str", "weight": "float"},
         "Attention of the carrying heads from the last token, a row a head and a column a token, above in the control "
         "and below in the treated prompt; everything before the user's words is one column"),
)
# fmt: on
