"""Figures of notebook 05: maps of position groups or single tokens by layer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from companion.plots import style
from companion.plots.style import BY_LAYER, ESTIMATE, LOG_ODDS, NAMES, by_layer, distinct, heading, new_figure, spec


def _map(ax: Axes, rows: list[object], part: pd.DataFrame, row: str, value: str, bound: float) -> AxesImage:
    """Effects by row and layer; hatched where the architecture lets no difference arrive, a dot where the sign is sure."""
    grid = part.pivot(index=row, columns="layer", values=value).reindex(rows)
    image = ax.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto")
    place = {name: i for i, name in enumerate(rows)}
    for name, earliest in part.groupby(row)["earliest"].first().items():
        width = int((grid.columns < earliest).sum())
        if width > 0:
            hatched = {"fc": "none", "ec": "#999999", "hatch": "////", "lw": 0}
            ax.axhspan(place[name] - 0.5, place[name] + 0.5, 0, width / grid.shape[1], **hatched)
    if "low" in part:
        sure = part[(part.low > 0) | (part.high < 0)]
        ax.plot(grid.columns.get_indexer(sure["layer"]), [place[name] for name in sure[row]], ".", color="black", ms=3)
    ax.set_xticks(style.ticks(grid.shape[1]), grid.columns[:: style.ticks(grid.shape[1]).step])
    ax.set_xlabel("layer")
    ax.grid(False)
    return image


def groups(table: pd.DataFrame, *, panel: str, title: str) -> Figure:
    """Position groups in reading order against layers, one panel for each value of `panel`, on one scale."""
    names, rows = distinct(table[panel]), distinct(table["group"])
    figure, axes = new_figure(1, len(names), 2.5 * len(names) + 1.6, 0.9 + 0.26 * len(rows), sharey=True)
    bound = float(table.estimate.abs().max()) or 1.0
    for ax, name in zip(axes[0], names, strict=True):
        image = _map(ax, rows, table[table[panel] == name], "group", "estimate", bound)
        ax.set_title(NAMES.get(str(name), str(name)))
    axes[0, 0].set_yticks(range(len(rows)), [str(name).replace("_", " ") for name in rows])
    figure.colorbar(image, ax=axes, label=SIGNED)
    heading(figure, title)
    return figure


def tokens(table: pd.DataFrame) -> Figure:
    """Single tokens of one pair against layers: columns layer, position, token, earliest, nie."""
    rows = sorted(table.position.unique())
    figure, axes = new_figure(1, 1, 5.0, 0.9 + 0.19 * len(rows))
    ax = axes[0, 0]
    image = _map(ax, rows, table, "position", "nie", float(table.nie.abs().max()) or 1.0)
    label = table.drop_duplicates("position").set_index("position")["token"]
    ax.set_yticks(np.arange(len(rows)), [label[at] for at in rows], fontsize=7)
    ax.set_title("Which token holds the effect?")
    figure.colorbar(image, ax=ax, label=SIGNED)
    return figure


def carriers(table: pd.DataFrame) -> Figure:
    """Shares of the paths by layer, from the first layer that has an effect to share out.

    Where that effect is next to none a share has no bounds: the axis ends at -1 and 2, and longer intervals leave it.
    """
    title, unit = "What carries the last token's signal on?", "share of the residual stream's effect"
    figure = by_layer(table, group="path", title=title, unit=unit, late=False)
    ax = figure.axes[0]
    ax.set_xlim(table.layer.min() - 0.5, table.layer.max() + 0.5)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, SHARES[0]), min(high, SHARES[1]))
    ax.get_legend().remove()
    style.legend_below(figure, [ax], 4)
    return figure


SHARES = (-1.0, 2.0)
SIGNED = f"{LOG_ODDS}; above 0: with the treatment"
HATCHED = "; hatched where the architecture lets no difference arrive"
# fmt: off
SPECS = (
    spec("05_tokens", tokens, "C4",
         {"layer": "int", "position": "int", "token": "str", "earliest": "float", "nie": "float"},
         f"Effect of the residual stream at every token and layer of one pair{HATCHED}"),
    spec("05_groups", groups, "C4", {"treatment": "str", "group": "str", "earliest": "float", **BY_LAYER},
         f"Effect of each position group's residual stream by layer, one panel a treatment{HATCHED}",
         panel="treatment", title="Residual stream: where is the signal, layer by layer?"),
    spec("05_components", groups, "C4", {"site": "str", "group": "str", "earliest": "float", **BY_LAYER},
         f"Effect of attention and MLP outputs by position group and layer{HATCHED}",
         panel="site", title="Attention and MLP outputs: who moves it?"),
    spec("05_hand_over", style.panels, "C4", {"treatment": "str", "where": "str", **BY_LAYER},
         "Share of the total effect in the residual stream of the last token, of all others, of the last instruction "
         "token, and of verb and object",
         panel="treatment", group="where", title="When does the last token take over?"),
    spec("05_carriers", carriers, "C4", {"path": "str", **BY_LAYER},
         "Share of the effect of the last token's residual stream that MLPs, attention and the skip path above carry"),
    spec("05_timing", style.dots, "C5c", {"schedule": "str", "clamp": "str", **ESTIMATE},
         "Harmful answers to jailbroken prompts with the last layer clamped at different times, with Wilson intervals",
         row="schedule", group="clamp", title="When must the last layer be closed?", unit="share of harmful answers",
         limits=(-0.05, 1.05), below=True),
    spec("05_input", style.dots, "C4", {"group": "str", "view": "str", **ESTIMATE},
         "Effect of each position group replaced in the prompt, beside that of its activations after the first layer",
         row="group", group="view", title="What is read, and where the signal is", unit=LOG_ODDS, marks=(0.0,),
         below=True),
)
# fmt: on
