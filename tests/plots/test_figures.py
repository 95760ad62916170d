"""Figures: every one draws its table and nothing else, in the same bytes each time, readable without colour, without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_tables import NAMES, drawn, numbers, table_for
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from companion.base import files, paths
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.plots import figures, style
from companion.plots.figures import SPECS, describe, index, spec_of
from companion.plots.style import FigureSpec

ESTIMATES = [name for name in NAMES if "estimate" in spec_of(name).columns]
# In these, numbers are colours.
MAPS = ("02_treatments", "02_computed", "03_total_direct", "03_heads", "05_groups", "07_plants")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and figures of a run "made" that has the table of every figure."""
    for module in (paths, figures):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    for entry in SPECS:
        files.write_table(table_for(entry), tmp_path / "results" / "made" / f"{entry.name}.csv")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_every_estimate_and_interval_is_drawn_under_a_title_with_its_unit(name: str) -> None:
    entry, table = spec_of(name), table_for(spec_of(name))
    figure = drawn(name, table)
    shown = numbers(figure)
    for column in ("estimate", "low", "high", "band_low", "band_high"):
        if column in entry.columns and not (name in MAPS and column in ("low", "high")):
            assert set(table[column].round(9)) <= shown, column
    titles = [figure.get_suptitle(), *(ax.get_title(loc="left") for ax in figure.axes)]
    assert any(len(title) > 10 for title in titles)
    if "estimate" in entry.columns:
        axis = " ".join(ax.get_xlabel() + ax.get_ylabel() for ax in figure.axes)
        assert re.search("log-odds|share|P\\(|direction lengths", axis)
    drawn(name, table.head(1))


@pytest.mark.parametrize("name", [name for name in ESTIMATES if name not in MAPS])
def test_colour_is_never_alone(name: str) -> None:
    for ax in filter(Axes.get_visible, drawn(name).axes):
        lines = [line for line in ax.get_lines() if line.get_marker() in style.MARKERS]
        styles = {(to_hex(line.get_color()).upper(), line.get_marker()) for line in lines}
        assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles) > 0
        assert {colour for colour, _ in styles} <= set(style.OKABE_ITO)


@pytest.mark.parametrize("name", ESTIMATES)
def test_intervals_without_limits_draw(name: str, folders: Path) -> None:
    table = table_for(spec_of(name))
    for column in table.columns.intersection(["low", "high", "band_low", "band_high"]):
        table.loc[table.index[::3], column] = -np.inf if column.endswith("low") else np.inf
    files.write_table(table, folders / "results" / "made" / f"{name}.csv")
    figures.show(name, "made")
    axes = drawn(name, table).axes
    assert all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in axes)


def test_files_are_the_same_bytes_in_a_fresh_process_that_never_sees_torch(folders: Path) -> None:
    """As `./run_all.sh --figures` draws them: every figure, another hash seed, and no model stack."""
    assert figures.redraw("made") == NAMES
    first = {path.name: path.read_bytes() for path in (folders / "figures" / "made").iterdir()}
    assert sorted(first) == sorted(f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg"))
    code = "import sys; from companion.plots import figures; figures.redraw('made'); print({'torch', 'sklearn'} & {*sys.modules})"
    places = {"COMPANION_RESULTS": str(folders / "results"), "COMPANION_FIGURES": str(folders / "again")}
    variables = {**os.environ, **places, "PYTHONHASHSEED": "7", "MPLBACKEND": "Agg", "PYTHONPATH": str(paths.ROOT)}
    seen = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True, cwd=paths.ROOT)
    assert seen.strip() == "set()"
    second = {path.name: path.read_bytes() for path in (folders / "again" / "made").iterdir()}
    assert [name for name in first if first[name] != second.get(name)] == []


def test_alternative_text_is_in_both_files(folders: Path) -> None:
    shown = figures.show("02_cumulative", "made")
    table = files.read_table(folders / "results" / "made" / "02_cumulative.csv", spec_of("02_cumulative").columns)
    alt = describe(spec_of("02_cumulative"), table)
    assert shown.alt == alt
    with Image.open(folders / "figures" / "made" / "02_cumulative.png") as image:
        assert image.text["Description"] == alt and "Creation Time" not in image.text
        assert image.mode == "P"  # few colours: small files
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    svg = (folders / "figures" / "made" / "02_cumulative.svg").read_text(encoding="utf-8")
    assert alt in svg and "untrained twin" in svg and "<dc:date>" not in svg  # text stays text


@pytest.mark.parametrize("entry", SPECS, ids=lambda entry: entry.name)
def test_alternative_text_says_what_and_where(entry: FigureSpec) -> None:
    words = entry.shows.split()
    assert len(words) >= (12 if entry.name < "04" else 8), entry.shows
    assert not re.match(r"(a |the )?(figure|plot|chart|image|picture|graph)\b", entry.shows, re.IGNORECASE)
    table = table_for(entry)
    alt = describe(entry, table)
    assert alt.startswith(entry.shows)
    if "estimate" in entry.columns:
        top = table.loc[table.estimate.abs().idxmax()]
        assert f"{top.estimate:.2f} [{top.low:.2f}, {top.high:.2f}]" in alt
        for column in set(entry.columns) & {"site", "layer", "treatment", "model", "head"}:
            assert f"{column} {top[column]}" in alt
    assert describe(entry, table.head(0)) == f"{entry.shows}."


def test_alternative_text_has_a_number_for_each_line() -> None:
    entry = spec_of("02_cumulative")
    limits = {"estimate": [0.2, 1.0, -0.5], "low": 0.0, "high": 1.0}
    table = pd.DataFrame({"model": ["a", "a", "b"], "layer": [0, 1, 1], **limits})
    assert describe(entry, table).endswith("Of each: a 1.00 at layer 1; b -0.50 at layer 1.")


def test_a_figure_draws_its_csv_only(folders: Path) -> None:
    path = folders / "results" / "made" / "02_cumulative.csv"
    files.write_table(files.read_table(path, {}).assign(note="more"), path)
    figures.show("02_cumulative", "made")
    files.write_table(files.read_table(path, {}).drop(columns="earliest"), path)
    with pytest.raises(InputError, match="has no column 'earliest'"):
        figures.show("02_cumulative", "made")


def test_what_is_not_there_is_named(folders: Path) -> None:
    with pytest.raises(InputError, match="no figure '99_none'; there are 00_map"):
        spec_of("99_none")
    with pytest.raises(InputError, match="no result tables in results/nobody"):
        figures.redraw("nobody")
    for entry in SPECS[3:]:
        (folders / "results" / "made" / f"{entry.name}.csv").unlink()
    assert figures.redraw("made") == NAMES[:3]


def test_a_result_that_is_not_defined_is_a_frame_with_its_reason(folders: Path) -> None:
    shown = figures.show("02_benign", "made", NotDefined("the prompt set has no benign pairs"))
    svg = (folders / "figures" / "made" / "02_benign.svg").read_text(encoding="utf-8")
    assert shown.alt == "the prompt set has no benign pairs"
    assert svg.count("the prompt set has no benign pairs") >= 2  # drawn, and as alternative text


def test_the_index_lists_every_figure(folders: Path) -> None:
    figures.write_index()
    text = (folders / "figures" / "INDEX.md").read_text(encoding="utf-8")
    assert text == index() and "](../notebooks/02_layers.ipynb), cell" in text and "../../" not in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "`results/" in line]
    assert [row[1].strip("`") for row in rows] == NAMES == list(dict.fromkeys(NAMES))
    for entry, row in zip(SPECS, rows, strict=True):
        assert (row[0], row[2], row[4]) == (f"| {entry.claim}", f"`results/SLUG/{entry.name}.csv`", f"{entry.shows} |")


def test_the_index_finds_the_cell_that_shows_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = (["# Title"], ["figures.show(", "'02_cumulative', slug)"], 'figures.show("02_cumulative_other")')
    files.write_json({"cells": [{"source": source} for source in sources]}, tmp_path / "02_made.ipynb")
    monkeypatch.setattr(figures, "NOTEBOOKS", tmp_path)
    lines = {line.split("`")[1]: line for line in index().splitlines() if "`results/" in line}
    assert re.fullmatch(r"\[02_made\.ipynb\]\(.*02_made\.ipynb\), cell 2", lines["02_cumulative"].split(" | ")[3])
    assert "not shown" in lines["02_treatments"]
