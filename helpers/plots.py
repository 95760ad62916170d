"""A figure is drawn from its table, and the table is a file: `draw` writes the one and shows the other."""

from __future__ import annotations

import pandas as pd
from IPython.display import HTML, Image

from companion.base.display import NotDefined
from companion.base.files import write_table, write_text
from companion.base.paths import figures_dir, results_dir
from companion.plots.figures import show, write_index
from companion.plots.view import framed, interactive_map

__all__ = ["draw", "shade", "view", "write_index"]


def draw(name: str, table: pd.DataFrame | NotDefined, slug: str) -> Image:
    """Write a figure's table to `results/SLUG/NAME.csv`, draw it from there, and return it for the notebook.

    PNG and SVG go to `figures/SLUG/`; of a table that is `NotDefined` they are an empty frame with the reason. Raises
    InputError for a name that is no figure's, and for a table without its columns.
    """
    write_table(table, results_dir(slug) / f"{name}.csv")
    return show(name, slug, table if isinstance(table, NotDefined) else None)


def view(table: pd.DataFrame | NotDefined, name: str, slug: str) -> HTML | NotDefined:
    """The interactive map of one pair, layer by token for each site; also kept as `figures/SLUG/NAME.html`.

    `table` has columns site, layer, position, token and share, and where known low and high.
    """
    if isinstance(table, NotDefined):
        return table
    page = interactive_map(table)
    write_text(page, figures_dir(slug) / f"{name}.html")
    return HTML(framed(page, table.layer.nunique()))


def shade(table: pd.DataFrame) -> HTML:
    """A table of shares with numbers on colours: red with the treatment, blue against it, white at 0."""
    styler = table.style.background_gradient(cmap="RdBu_r", vmin=-1, vmax=1, axis=None)
    return HTML(styler.format("{:.2f}").set_uuid("shares").to_html())  # without an id, a rerun would change it
