"""Figures: every one draws its table and nothing else, in the same bytes each time, readable without colour, without torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from helpers import drawings, figures, paths, plots, store
from helpers.errors import InputError
from helpers.figure_list import SPECS, FigureSpec
from helpers.figures import describe, index, spec

NAMES = [entry.name for entry in SPECS]
CHOICES = {
    "model": ["embedded", "embedded (untrained)"],
    "site": ["attn_out", "mlp_out"],
    "treatment": ["T1", "T2", "T2b", "T2-T2b"],
    "effect": ["indirect", "direct"],
    "contrast": ["harm", "benign", "difference"],
    "estimand": ["NIE0", "NIE1", "INT"],
    "state": list(drawings.CELLS),
    "verdict": [*plots.VERDICTS, "not testable"],
    "claim": ["C1", "C2", "C3"],
    "group": list(drawings.GROUP_COLOURS),
    "layer": range(6),
    "head": range(4),
    "position": range(10),
    "panel": ["one", "two"],
    "split": ["discover", "validate", "test"],
    "differ": [False, True],
}
FREE = {"token", "control", "treated", "step", "what", "file", "notebook", "earliest"}


def table_for(entry: FigureSpec, seed: int = 0) -> pd.DataFrame:
    """All combinations of what a figure distinguishes, with estimates inside their intervals."""
    rng = np.random.default_rng(seed)
    crossed = [name for name in entry.columns if name in CHOICES]
    if {"position", "group"} <= set(crossed):
        crossed = ["position"]  # the token drawing: one row a position
    if {"state", "position"} <= set(crossed):
        crossed = ["panel", "layer", "position"]
    if "verdict" in crossed:
        crossed = ["model", "claim"]
    values = [CHOICES[name] for name in crossed] or [range(5)]
    made = pd.MultiIndex.from_product(values, names=crossed or ["row"]).to_frame(index=False)
    for name, kind in entry.columns.items():
        if name in made or name in ("estimate", "low", "high", "band_low", "band_high"):
            continue
        options = list(CHOICES.get(name, [f"{name} {i}" for i in range(4)] if kind == "str" else [3]))
        made[name] = [options[i % len(options)] for i in range(len(made))]
    if "estimate" in entry.columns:
        made["estimate"] = rng.normal(size=len(made))
        made["low"], made["high"] = (made.estimate + sign * rng.uniform(0.1, 0.5, len(made)) for sign in (-1, 1))
        made["band_low"], made["band_high"] = made.low - 0.2, made.high + 0.2
    return made[list(entry.columns)]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results and figures of a run "made" that has the table of every figure."""
    for module in (paths, figures):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    for entry in SPECS:
        store.write_table(table_for(entry), tmp_path / "results" / "made" / f"{entry.name}.csv")
    return tmp_path


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
    """A figure as `figures.show` draws it."""
    with plt.rc_context(plots.STYLE):
        return spec(name).draw(table_for(spec(name)) if table is None else table)


# ---- every figure ----


@pytest.mark.parametrize("name", NAMES)
def test_every_estimate_and_interval_is_drawn(name: str) -> None:
    entry = spec(name)
    table = table_for(entry)
    shown = numbers(drawn(name, table))
    for column in ("estimate", "low", "high", "band_low", "band_high"):
        if column in entry.columns and not (name == "03_heads" and column in ("low", "high")):
            assert set(table[column].round(9)) <= shown, column


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_titles_and_units(name: str) -> None:
    figure = drawn(name)
    titles = [figure.get_suptitle(), *(ax.get_title(loc="left") for ax in figure.axes)]
    assert any(len(title) > 10 for title in titles)
    if "estimate" in spec(name).columns:
        axis = " ".join(ax.get_xlabel() + ax.get_ylabel() for ax in figure.axes)
        assert re.search("log-odds|share|P\\(", axis)


@pytest.mark.parametrize("name", [name for name in NAMES if "estimate" in spec(name).columns and name != "03_heads"])
def test_colour_is_never_alone(name: str) -> None:
    figure = drawn(name)
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        styles = {
            (to_hex(line.get_color()).upper(), line.get_marker())
            for line in ax.get_lines()
            if line.get_marker() in plots.MARKERS
        }
        assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles) > 0
        assert {colour for colour, _ in styles} <= set(plots.OKABE_ITO)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_one_row_draws(name: str) -> None:
    drawn(name, table_for(spec(name)).head(1))


@pytest.mark.parametrize("name", [name for name in NAMES if "estimate" in spec(name).columns])
def test_intervals_without_limits_draw(name: str, folders: Path) -> None:
    entry = spec(name)
    table = table_for(entry)
    for column, value in (("low", -np.inf), ("high", np.inf), ("band_low", -np.inf), ("band_high", np.inf)):
        if column in entry.columns:
            table.loc[table.index[::3], column] = value
    store.write_table(table, folders / "results" / "made" / f"{name}.csv")
    figures.show(name, "made")
    axes = drawn(name, table).axes
    assert all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in axes)


# ---- the kinds of drawing ----


def test_an_interval_beside_its_estimate_is_drawn_where_it_is() -> None:
    """A BCa interval of a skewed statistic need not hold the estimate."""
    table = pd.DataFrame(
        {
            "layer": [0, 1, 2],
            "site": "mlp_out",
            "estimate": [0.0, 1.0, 2.0],
            "low": [0.35, 0.5, 1.0],
            "high": [0.6, 0.8, 3.0],
        }
    )
    shown = numbers(plots.by_layer(table, group="site", title="", unit=""))
    assert {0.6, 0.5, 1.0, 3.0} <= shown
    assert not {-0.35, 1.2} & shown  # limits mirrored at the estimate


def test_late_layers_are_those_of_the_claims() -> None:
    for n_layers, first in ((6, 4), (12, 8), (3, 2), (2, 1)):
        table = pd.DataFrame({"layer": range(n_layers), "site": "mlp_out", "estimate": 0.0, "low": -1.0, "high": 1.0})
        ax = plots.by_layer(table, group="site", title="", unit="").axes[0]
        (shade,) = [patch for patch in ax.patches if patch.get_label() == "late layers"]
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (first - 0.5, n_layers - 0.5)


def test_the_light_cone_is_shaded() -> None:
    table = table_for(spec("02_cumulative"))
    for earliest, n_shaded in ((3.0, 1), (0.0, 0), (-1.0, 0), (np.nan, 0)):
        ax = plots.cumulative(table.assign(earliest=earliest)).axes[0]
        assert len(ax.patches) == n_shaded
        assert bool(ax.texts) == bool(n_shaded)
        if n_shaded:
            assert ax.patches[0].get_x() + ax.patches[0].get_width() == earliest - 0.5


def test_a_heatmap_is_centred_and_dots_what_excludes_0() -> None:
    table = pd.DataFrame(
        [
            (0, 0, "a", 3.0, 2.0, 4.0),
            (0, 1, "a", 0.1, -1.0, 1.0),
            (1, 0, "a", -1.0, -2.0, -0.5),
            (1, 1, "a", 0.0, 0.0, 0.0),
        ],
        columns=["layer", "head", "effect", "estimate", "low", "high"],
    )
    ax = plots.heatmap(table, row="layer", column="head", panel="effect", title="", unit="").axes[0]
    assert ax.images[0].get_clim() == (-3, 3)
    assert ax.images[0].get_array().tolist() == [[3.0, 0.1], [-1.0, 0.0]]
    assert list(zip(*ax.get_lines()[0].get_data(), strict=True)) == [(0, 0), (0, 1)]  # x: head, y: layer
    assert ax.get_ylim()[0] < ax.get_ylim()[1]  # layer 0 at the bottom


def test_verdicts_are_told_by_sign_too() -> None:
    rows = [
        ("m", "C1", "supported"),
        ("m", "C2", "contradicted"),
        ("n", "C1", "inconclusive"),
        ("n", "C2", "not testable"),
    ]
    ax = plots.verdicts(pd.DataFrame(rows, columns=["model", "claim", "verdict"])).axes[0]
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "+",
        (1, 0): "-",
        (0, 1): "?",
        (1, 1): "",
    }
    assert [label.get_text() for label in ax.get_yticklabels()] == ["m", "n"]


def test_tokens_that_differ_are_outlined() -> None:
    table = pd.DataFrame(
        {
            "position": range(3),
            "group": ["header", "verb", "rest"],
            "control": list("abc"),
            "treated": list("adc"),
            "differ": [False, True, False],
        }
    )
    figure = drawings.tokens(table)
    (ax,) = figure.axes
    wide = {patch.get_x() for patch in ax.patches if patch.get_linewidth() > 1}
    assert wide == {1}
    assert {"a", "b", "c", "d", "control", "treated", "header", "verb"} <= {text.get_text() for text in ax.texts}


def test_the_grid_counts_its_cells() -> None:
    states = ["clean"] * 6 + ["patched", "recomputed", "clean", "read"]
    table = pd.DataFrame(
        {
            "panel": "p",
            "layer": [0] * 5 + [1] * 5,
            "position": [*range(5), *range(5)],
            "state": states,
            "token": list("abcde") * 2,
        }
    )
    ax = drawings.grid(table).axes[0]
    assert "30%" in ax.get_title() + ax.get_title(loc="left")
    assert len(ax.patches) == 10


# ---- files ----


def test_files_are_the_same_bytes_in_a_fresh_process_that_never_sees_torch(folders: Path) -> None:
    """As `./run_all.sh --figures` draws them: every figure, another hash seed, and no model stack."""
    assert figures.redraw("made") == NAMES
    first = {path.name: path.read_bytes() for path in (folders / "figures" / "made").iterdir()}
    assert sorted(first) == sorted(f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg"))
    code = (
        "import sys; from helpers import figures; figures.redraw('made'); "
        "print([name for name in ('torch', 'transformers', 'sklearn', 'jax') if name in sys.modules])"
    )
    places = {"COMPANION_RESULTS": str(folders / "results"), "COMPANION_FIGURES": str(folders / "again")}
    variables = {**os.environ, **places, "PYTHONHASHSEED": "7", "MPLBACKEND": "Agg", "PYTHONPATH": str(paths.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False, cwd=paths.ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    second = {path.name: path.read_bytes() for path in (folders / "again" / "made").iterdir()}
    assert [name for name in first if first[name] != second.get(name)] == []


def test_alternative_text_is_in_both_files(folders: Path) -> None:
    shown = figures.show("02_components", "made")
    table = store.read_table(folders / "results" / "made" / "02_components.csv", spec("02_components").columns)
    alt = describe(spec("02_components"), table)
    assert shown.alt == alt
    with Image.open(folders / "figures" / "made" / "02_components.png") as image:
        assert image.text["Description"] == alt
        assert "Creation Time" not in image.text
    svg = (folders / "figures" / "made" / "02_components.svg").read_text(encoding="utf-8")
    assert alt in svg
    assert "attention" in svg  # text stays text
    assert "<dc:date>" not in svg


@pytest.mark.parametrize("name", NAMES)
def test_alternative_text_says_what_and_where(name: str) -> None:
    entry = spec(name)
    table = table_for(entry)
    alt = describe(entry, table)
    assert alt.startswith(entry.shows)
    if "estimate" in entry.columns:
        top = table.loc[table.estimate.abs().idxmax()]
        assert f"{top.estimate:.2f} [{top.low:.2f}, {top.high:.2f}]" in alt
        for column in set(entry.columns) & {"site", "layer", "treatment", "model", "head"}:
            assert f"{column} {top[column]}" in alt
    assert describe(entry, table.head(0)) == f"{entry.shows}."


def test_a_figure_draws_its_csv_only(folders: Path) -> None:
    path = folders / "results" / "made" / "02_components.csv"
    store.write_table(store.read_table(path, {}).assign(note="more"), path)
    figures.show("02_components", "made")
    store.write_table(store.read_table(path, {}).drop(columns="band_low"), path)
    with pytest.raises(InputError, match="has no column 'band_low'"):
        figures.show("02_components", "made")


def test_what_is_not_there_is_named(folders: Path) -> None:
    with pytest.raises(InputError, match="no figure '99_none'; there are 00_pipeline"):
        spec("99_none")
    with pytest.raises(InputError, match="no result tables in results/nobody"):
        figures.redraw("nobody")
    for entry in SPECS[3:]:
        (folders / "results" / "made" / f"{entry.name}.csv").unlink()
    assert figures.redraw("made") == NAMES[:3]


def test_the_index_lists_every_figure(folders: Path) -> None:
    figures.write_index()
    text = (folders / "figures" / "INDEX.md").read_text(encoding="utf-8")
    assert text == index()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "`results/" in line]
    assert [row[1].strip("`") for row in rows] == NAMES
    for entry, row in zip(SPECS, rows, strict=True):
        assert row[0] == f"| {entry.claim}"
        assert row[2] == f"`results/SLUG/{entry.name}.csv`"
        assert row[4] == f"{entry.shows} |"


def test_the_index_finds_the_cell_that_shows_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [
        {"source": ["# Title"]},
        {"source": ["figures.show(", "'02_grid', slug)"]},
        {"source": 'figures.show("02_grid_other")'},
    ]
    store.write_json({"cells": cells}, tmp_path / "02_made.ipynb")
    monkeypatch.setattr(figures, "NOTEBOOKS", tmp_path)
    lines = {line.split("`")[1]: line for line in index().splitlines() if "`results/" in line}
    assert re.fullmatch(r"\[02_made\.ipynb\]\(.*02_made\.ipynb\), cell 2", lines["02_grid"].split(" | ")[3])
    assert "not shown" in lines["02_components"]


def test_names_are_unique_and_claims_are_claims() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {entry.claim for entry in SPECS} <= {"all", "C1", "C2", "C3", "C4", "C5a", "C5b", "C5c", "C6", "C7"}
    assert all(re.fullmatch(r"\d\d_[a-z_]+", name) for name in NAMES)
