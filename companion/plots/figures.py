"""Draw, save and index the figures: each is a function of its CSV and of nothing else.

So a notebook and `./run_all.sh --figures` draw the same picture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import pandas as pd
from IPython.display import Image
from matplotlib.figure import Figure
from PIL import Image as pil
from PIL.PngImagePlugin import PngInfo

from companion.base import files
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.paths import FIGURES, NOTEBOOKS, RESULTS, check_slug, figures_dir, results_dir
from companion.plots import calibration, layers, neurons, steering, style, tokens
from companion.plots.style import ESTIMATE, FigureSpec

PARTS = (layers, neurons, tokens, steering, calibration)
SPECS = tuple(sorted((one for part in PARTS for one in part.SPECS), key=lambda one: one.name.partition("_")[0]))


def spec_of(name: str) -> FigureSpec:
    """The entry of a figure; `InputError` lists the names if there is none."""
    found = [entry for entry in SPECS if entry.name == name]
    if not found:
        raise InputError(f"no figure '{name}'; there are {', '.join(entry.name for entry in SPECS)}")
    return found[0]


def describe(entry: FigureSpec, table: pd.DataFrame) -> str:
    """Alternative text: what the figure shows, and its largest estimate where it has estimates."""
    if "estimate" not in table or table.empty:
        return f"{entry.shows}."
    top = table.loc[table.estimate.abs().idxmax()]
    shown = [name for name in entry.columns if name not in (*ESTIMATE, "earliest")]
    where = ", ".join(f"{name} {top[name]}" for name in shown)
    return f"{entry.shows}. Largest: {top.estimate:.2f} [{top.low:.2f}, {top.high:.2f}] at {where}.{_of_each(entry, table)}"


def _of_each(entry: FigureSpec, table: pd.DataFrame) -> str:
    """The largest estimate of each line or panel, if there are two to eight."""
    names = [name for name, kind in entry.columns.items() if kind == "str"]
    parts = list(table.groupby(names, sort=False)) if names else []
    if not 1 < len(parts) <= 8 or len(parts) == len(table):
        return ""
    tops = [(" ".join(map(str, of)), part.loc[part.estimate.abs().idxmax()]) for of, part in parts]
    at = [f" at layer {top.layer}" if "layer" in top else "" for _, top in tops]
    return " Of each: " + "; ".join(f"{of} {top.estimate:.2f}{w}" for (of, top), w in zip(tops, at, strict=True)) + "."


def save_figure(figure: Figure, name: str, slug: str, *, alt: str) -> None:
    """Write PNG and SVG side by side, with `alt` inside both and no date, so that a second run gives the same bytes."""
    folder = figures_dir(slug)
    # "none" keeps text as text: small files that can be searched and read aloud.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for suffix, unwanted in (("png", "Software"), ("svg", "Date")):
            with files.replacing(folder / f"{name}.{suffix}") as scratch:
                figure.savefig(scratch, metadata={"Description": alt, unwanted: None})
                if suffix == "png":
                    _fewer_colours(scratch)


def _fewer_colours(path: Path) -> None:
    """Write a PNG again with at most 256 colours, its text kept: a third of the bytes, and notebooks hold it too."""
    with pil.open(path) as full:
        said = PngInfo()
        for key, text in full.info.items():
            if isinstance(key, str) and isinstance(text, str):
                said.add_text(key, text)
        small = full.convert("RGB").quantize(method=pil.Quantize.MAXCOVERAGE, dither=pil.Dither.NONE)
        small.save(path, optimize=True, pnginfo=said, dpi=full.info["dpi"])


def show(name: str, slug: str, table: pd.DataFrame | NotDefined | None = None) -> Image:
    """Draw a figure from its CSV, save it, and return it for a notebook with its alternative text.

    A `table` that is `NotDefined` has no CSV: the figure is then an empty frame with the reason.
    """
    entry = spec_of(name)
    with style.theme():
        if isinstance(table, NotDefined):
            alt, figure = str(table), style.not_defined(table)
        else:
            found = files.read_table(results_dir(slug) / f"{name}.csv", entry.columns)
            alt, figure = describe(entry, found), entry.draw(found)
        save_figure(figure, name, slug, alt=alt)
    return Image(filename=str(figures_dir(slug) / f"{name}.png"), alt=alt)


def redraw(slug: str) -> list[str]:
    """Draw again every figure whose table is there, and write the index; returns the names."""
    folder = RESULTS / check_slug(slug)
    drawn = [entry.name for entry in SPECS if (folder / f"{entry.name}.csv").is_file()]
    if not drawn:
        raise InputError(f"no result tables in results/{slug}: run ./run_all.sh first")
    for name in drawn:
        show(name, slug)
    write_index()
    return drawn


def write_index() -> None:
    """Write `figures/INDEX.md`: claim -> figure -> result file -> notebook cell."""
    files.write_text(index(), FIGURES / "INDEX.md")


def index() -> str:
    """The index as Markdown; a cell is counted from 1 over all cells of its notebook."""
    lines = [
        "# Figures",
        "",
        "Generated by `./run_all.sh --figures`. `SLUG` is the name of the run (`smollm2-refuser` by default).",
        "",
        "| claim | figure | drawn from | notebook, cell | shows |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in SPECS:
        source = f"`results/SLUG/{entry.name}.csv`"
        lines.append(f"| {entry.claim} | `{entry.name}` | {source} | {_cell_of(entry.name)} | {entry.shows} |")
    return "\n".join(lines) + "\n"


def _cell_of(name: str) -> str:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells, start=1):
            if re.search(rf"(?:figures\.show|show|draw)\(\s*[\"']{name}[\"']", "".join(cell["source"])):
                return f"[{path.name}](../notebooks/{path.name}), cell {number}"
    return "not shown"
