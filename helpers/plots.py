"""A figure is drawn from its table, and the table is a file: `draw` writes the one and shows the other."""

from __future__ import annotations

import pandas as pd
from IPython.display import Image

from companion.base.display import NotDefined
from companion.base.files import write_table
from companion.base.paths import results_dir
from companion.plots.figures import show, write_index

__all__ = ["draw", "show", "write_index"]


def draw(name: str, table: pd.DataFrame | NotDefined, slug: str) -> Image:
    """Write a figure's table to `results/SLUG/NAME.csv`, draw it from there, and return it for the notebook.

    A table that is `NotDefined` is not written; the figure is then an empty frame with the reason. PNG and SVG go to
    `figures/SLUG/`, with the same alternative text. Raises InputError for a name that is no figure's, and for a table
    without its columns.
    """
    write_table(table, results_dir(slug) / f"{name}.csv")
    return show(name, slug, table if isinstance(table, NotDefined) else None)
