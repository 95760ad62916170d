"""Figures and the interactive view: what is drawn where, readable without colour, and the same bytes each time."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from companion.base import files, paths
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.thresholds import COMPONENTS
from companion.plots import calibration, figures, layers, neurons, style
from companion.plots.figures import SPECS, describe, spec_of
from companion.plots.style import ESTIMATE, FigureSpec
from companion.plots.view import framed, interactive_map

# ---- tables and figures as numbers ----

NAMES = [entry.name for entry in SPECS]
CHOICES = {
    "model": ["embedded"], "line": ["T2", "untrained twin"], "site": ["attn_out", "mlp_out"],
    "treatment": ["T1", "T2", "T2b", "T2-T2b"],
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
        if name in made or name in ESTIMATE:
            continue
        usual = {"str": [f"{name} {i}" for i in range(4)], "bool": [True, False]}
        options = list(CHOICES.get(name, usual.get(kind, [3])))
        made[name] = [options[i % len(options)] for i in range(len(made))]
    if "estimate" in entry.columns:
        made["estimate"] = rng.normal(size=len(made))
        made["low"], made["high"] = (made.estimate + sign * rng.uniform(0.1, 0.5, len(made)) for sign in (-1, 1))
    return made[list(entry.columns)]


def numbers(figure: Figure) -> set[float]:
    """Every coordinate that an axis of the figure shows, as data."""
    found = [np.zeros(0)]
    for ax in figure.axes:
        found += [values for line in ax.get_lines() for values in (line.get_xdata(), line.get_ydata())]
        found += [path.vertices for collection in ax.collections for path in collection.get_paths()]
        found += [np.ma.filled(image.get_array(), np.nan) for image in ax.images]
    flat = np.concatenate([np.ravel(values).astype(float) for values in found])
    return set(flat[np.isfinite(flat)].round(9).tolist())


def drawn(name: str, table: pd.DataFrame | None = None) -> Figure:
    with style.theme():
        return spec_of(name).draw(table_for(spec_of(name)) if table is None else table)


# ---- figures ----

ESTIMATES = [name for name in NAMES if "estimate" in spec_of(name).columns]
MAPS = ("02_treatments", "02_computed", "03_total_direct", "03_heads", "05_groups", "07_plants")  # numbers are colours


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results and figures go."""
    for module in (paths, figures):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
        monkeypatch.setattr(module, "FIGURES", tmp_path / "figures")
    return tmp_path


@pytest.fixture
def folders(places: Path) -> Path:
    """A run "made" that has the table of every figure."""
    for entry in SPECS:
        files.write_table(table_for(entry), places / "results" / "made" / f"{entry.name}.csv")
    return places


@pytest.mark.parametrize("name", NAMES)
def test_every_estimate_and_interval_is_drawn_under_a_title_with_its_unit(name: str) -> None:
    entry, table = spec_of(name), table_for(spec_of(name))
    figure = drawn(name, table)
    shown = numbers(figure)
    for column in ESTIMATE:
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
def test_intervals_without_limits_draw(name: str, places: Path) -> None:
    table = table_for(spec_of(name))
    table.loc[table.index[::3], ["low", "high"]] = -np.inf, np.inf
    files.write_table(table, places / "results" / "made" / f"{name}.csv")
    figures.show(name, "made")
    assert all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in drawn(name, table).axes)


def test_files_are_the_same_bytes_in_a_fresh_process_that_never_sees_torch(folders: Path) -> None:
    of_a_kind = {getattr(entry.draw, "func", entry.draw): entry.name for entry in SPECS}  # a figure of each kind
    kept = [name for name in NAMES if name in of_a_kind.values()]
    for name in {*NAMES} - {*kept}:
        (folders / "results" / "made" / f"{name}.csv").unlink()
    assert figures.redraw("made") == kept and len(kept) > 20
    first = {path.name: path.read_bytes() for path in (folders / "figures" / "made").iterdir()}
    assert sorted(first) == sorted(f"{name}.{suffix}" for name in kept for suffix in ("png", "svg"))
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
    table = table_for(entry)
    alt = describe(entry, table)
    assert alt.startswith(entry.shows)
    if "estimate" in entry.columns:
        top = table.loc[table.estimate.abs().idxmax()]
        assert f"{top.estimate:.2f} [{top.low:.2f}, {top.high:.2f}]" in alt
        for column in set(entry.columns) & {"site", "layer", "treatment", "model", "head"}:
            assert f"{column} {top[column]}" in alt
    assert describe(entry, table.head(0)) == f"{entry.shows}."
    rows = pd.DataFrame({"model": ["a", "a", "b"], "line": "T2", "layer": [0, 1, 1], "estimate": [0.2, 1.0, -0.5]})
    said = describe(spec_of("02_cumulative"), rows.assign(low=0.0, high=1.0))
    assert said.endswith("Of each: a T2 1.00 at layer 1; b T2 -0.50 at layer 1.")


def test_a_figure_draws_its_csv_only_and_what_is_not_there_is_named(folders: Path) -> None:
    path = folders / "results" / "made" / "02_cumulative.csv"
    files.write_table(files.read_table(path, {}).assign(note="more"), path)
    figures.show("02_cumulative", "made")
    files.write_table(files.read_table(path, {}).drop(columns="earliest"), path)
    with pytest.raises(InputError, match="has no column 'earliest'"):
        figures.show("02_cumulative", "made")
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


def test_the_index_lists_every_figure_and_the_cell_that_shows_it(places: Path, monkeypatch) -> None:
    sources = (["# Title"], ["figures.show(", "'02_cumulative', slug)"], 'figures.show("02_cumulative_other")')
    files.write_json({"cells": [{"source": source} for source in sources]}, places / "02_made.ipynb")
    monkeypatch.setattr(figures, "NOTEBOOKS", places)
    figures.write_index()
    lines = (places / "figures" / "INDEX.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and "`results/" in line]
    for entry, row in zip(SPECS, rows, strict=True):
        cell = "[02_made.ipynb](../notebooks/02_made.ipynb), cell 2" if entry.name == "02_cumulative" else "not shown"
        named = [f"| {entry.claim}", f"`{entry.name}`", f"`results/SLUG/{entry.name}.csv`"]
        assert row == [*named, cell, f"{entry.shows} |"]
    assert len(set(NAMES)) == len(NAMES)


# ---- style, and the kinds of drawing ----


def test_an_interval_beside_its_estimate_is_drawn_where_it_is() -> None:
    """A BCa interval of a skewed statistic need not hold the estimate."""
    table = pd.DataFrame({"estimate": [0.0, 1.0, 2.0], "low": [0.35, 0.5, 1.0], "high": [0.6, 0.8, 3.0]})
    table = table.assign(layer=range(3), site="mlp_out")
    shown = numbers(style.by_layer(table, group="site", title="", unit=""))
    assert {0.6, 0.5, 1.0, 3.0} <= shown
    assert not {-0.35, 1.2} & shown  # limits mirrored at the estimate


def test_late_layers_are_those_of_the_claims() -> None:
    for n_layers, first in ((6, 4), (12, 8), (3, 2), (2, 1)):
        table = pd.DataFrame({"layer": range(n_layers), "site": "mlp_out", "estimate": 0.0, "low": -1.0, "high": 1.0})
        ax = style.by_layer(table, group="site", title="", unit="").axes[0]
        (shade,) = [patch for patch in ax.patches if patch.get_label() == "late layers"]
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (first - 0.5, n_layers - 0.5)


def test_the_light_cone_is_shaded_in_the_panel_of_each_model() -> None:
    table = table_for(spec_of("02_cumulative"))
    for earliest, n_shaded in ((3.0, 1), (0.0, 0), (-1.0, 0), (np.nan, 0)):
        other = table.assign(model="full-0", earliest=0.0)
        figure = style.cumulative(pd.concat([table.assign(earliest=earliest), other]))
        ax, right = figure.axes
        assert [one.get_title() for one in figure.axes] == ["embedded", "full-0"] and not right.patches
        assert [text.get_text() for text in right.get_legend().get_texts()] == ["untrained twin", "T2"]
        assert len(ax.patches) == n_shaded and bool(ax.texts) == bool(n_shaded)
        if n_shaded:
            assert ax.patches[0].get_x() + ax.patches[0].get_width() == earliest - 0.5


def test_answers_are_told_by_words_and_numbers_too() -> None:
    said = ["supported", "contradicted", "cannot tell", "not testable"]
    table = pd.DataFrame({"model": list("mmnn"), "claim": ["C2", "C1", "C1", "C2"], "answer": said})
    given = ["9 [8, 10] % of direct effects", "15 [1, 20] neurons", "3.0 [1.0, 4.0] points of judged harm", np.nan]
    table = table.assign(name="few neurons", number=given)
    ax = style.answers(table).axes[0]
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 1): "yes 9 %\n[8, 10]", (0, 0): "no 15 neur.\n[1, 20]", (1, 0): "3.0 pts\n[1.0, 4.0]",
    }  # fmt: skip
    cells = {patch.get_xy(): patch.get_hatch() for patch in ax.patches if patch.get_width()}
    assert len(cells) == 3 and sum(hatch is not None for hatch in cells.values()) == 1
    assert [label.get_text().split()[0] for label in ax.get_yticklabels()] == ["C1", "C2"]
    assert all(text.get_fontsize() >= 8 for text in (*ax.texts, *ax.get_yticklabels()))
    undecided = table.assign(number="", answer="inconclusive")
    for one, words in ((table, "yes   9 [8, 10] % of direct effects"), (undecided, "?   no number")):
        assert [text.get_text() for text in style.answers(one.iloc[[0]]).axes[0].texts] == [words]


def test_tokens_that_differ_are_outlined() -> None:
    table = pd.DataFrame({"group": ["header", "verb", "rest"], "control": list("abc"), "treated": list("adc")})
    (ax,) = layers.pair_tokens(table.assign(position=range(3), differ=[False, True, False])).axes
    wide = {patch.get_x() for patch in ax.patches if patch.get_linewidth() > 1}
    assert wide == {0}, "the user's turn begins at 0, right of what all prompts share"
    shown = {text.get_text() for text in ax.texts}
    assert {"b", "c", "d", "control", "treated", "verb"} <= shown and "a" not in shown
    assert any(text.startswith("1 tokens") for text in shown)


def test_a_component_map_has_a_number_in_every_cell() -> None:
    table = pd.MultiIndex.from_product([range(30), ["mlp_out", "attn_out"]], names=["layer", "site"]).to_frame(
        index=False
    )
    shares = np.where(table.site == "mlp_out", 0.25, -0.004 * table.layer)
    ax = layers.component_map(table.assign(share=shares), title="").axes[0]
    said = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(said) == 60 and said[29, 1] == "25" and said[29, 0] == "\N{MINUS SIGN}12" and said[1, 0] == "0"
    assert ax.images[0].get_clim() == (-100, 100), "one scale for all pairs"


def test_treatments_are_named_and_splits_in_order() -> None:
    rows = [(name, split) for split in ("test", "discover", "validate") for name in ("T2", "B1", "other")]
    table = pd.DataFrame(rows, columns=["treatment", "split"]).assign(estimate=1.0, low=0.5, high=1.5)
    ax = layers.total_effects(table, title="", unit="").axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["discover", "validate", "test"]
    named = [label.get_text() for label in ax.get_yticklabels()]
    assert named == ["T2: jailbreak wrapper, harmful request", "B1: a benign choice", "other"]


@pytest.mark.parametrize("name", ["03_total_direct", "04_curves"])
def test_a_title_names_the_contrast(name: str) -> None:
    figure = drawn(name, table_for(spec_of(name)).assign(of="T2-T2b"))
    assert "T2 − T2b" in figure.get_suptitle() + figure.axes[0].get_title(loc="left")


def test_a_row_of_one_group_is_drawn_at_its_label() -> None:
    rows = [("both", "a", 1.0), ("both", "b", 2.0), ("one", "b", 3.0)]
    table = pd.DataFrame(rows, columns=["row", "group", "estimate"]).assign(low=0.0, high=4.0)
    ax = style.dots(table, row="row", group="group", title="", unit="").axes[0]
    at = {x: y for line in ax.get_lines() for x, y in line.get_xydata().tolist() if x in (1.0, 2.0, 3.0)}
    assert at[3.0] == 1.0 and at[1.0] < 0.0 < at[2.0]


def test_a_thin_line_says_where_an_order_arrives_for_good() -> None:
    table = pd.DataFrame({"k": [1, 10, 1, 10], "series": ["a", "a", "b", "b"], "k90": [7.0, 7.0, np.nan, np.nan]})
    ax = neurons.set_curves(table.assign(estimate=0.5, low=0.4, high=0.6)).axes[0]
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"] == [7.0]
    assert [text.get_text() for text in ax.texts] == ["a: k90 = 7"]


def test_how_few_neurons_are_allowed_is_shaded_and_said() -> None:
    table = pd.DataFrame(
        {"behaviour": ["harm", "B4"], "words": ["refuse or answer", '"tip" or "poem"'], "quantity": "k90"}
    )
    figure = neurons.sparsity(table.assign(estimate=[694.0, 90.0], low=80.0, high=900.0, few=15))
    (ax,), (legend,) = figure.axes, figure.legends
    assert [patch.get_x() + patch.get_width() for patch in ax.patches] == [15]
    assert "at most 15 neurons" in legend.get_texts()[0].get_text()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["harm: refuse or answer", 'B4: "tip" or "poem"']


def test_what_decides_is_framed() -> None:
    rows = [(layer, site, "", 0.5) for layer in range(3) for site in COMPONENTS]
    table = pd.DataFrame(rows, columns=["layer", "site", "role", "share"]).assign(model="A")
    table.loc[3, "role"] = "decides"
    (frame,) = calibration.built(table).axes[0].patches
    assert (frame.get_x(), frame.get_y()) == pytest.approx((0.53, 0.55))


def test_places_that_were_trained_are_framed_together() -> None:
    own = pd.DataFrame({"place": list("abcde"), "learned": [True, True, False, True, True], "effect": "e"})
    own["in_refuser"] = [np.nan] * 4 + [0.8]
    whole = own.assign(kind="all", learned=True, estimate=[0.4, 0.3, 0.2, 0.1, 1.0])
    table = pd.concat([whole, own.assign(kind="k", estimate=[0.04, 0.7, 0.06, 0.0, 0.74])]).assign(low=0.0, high=1.0)
    ax = calibration.plants(table).axes[0]
    frames = [(one.get_x(), one.get_width()) for one in ax.patches if one.get_y() > 0]  # the last place is all of them
    assert frames == [pytest.approx((-0.47, 1.94)), pytest.approx((2.53, 0.94))]
    said = [(text.get_text(), text.get_color()) for text in ax.texts if text.get_position()[1] == 1]
    assert said == [("70", "white"), ("6", "black"), ("74", "white"), ("80", "white")]


def test_each_rate_has_its_target_and_a_claim_without_models_says_so() -> None:
    table = pd.DataFrame({"claim": ["C1", "C1", "C2"], "error": ["false supported", *["power to support"] * 2]})
    ax = drawn("07_errors", table.assign(estimate=0.5, low=0.4, high=0.6)).axes[0]
    assert [text.get_text() for text in ax.texts] == ["● ≤ 0.05", "■ ≤ 0.2", "▲ ≥ 0.8", "● none built"]
    assert ax.texts[-1].get_position() == (1, 1), "in the second row, that of C2"


# ---- view ----


def table(n_layers: int, n_tokens: int) -> pd.DataFrame:
    axes = {"site": ("resid_post", "attn_out", "mlp_out"), "layer": range(n_layers), "position": range(n_tokens)}
    made = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False)
    share = made.layer / n_layers - 0.25 * (made.site == "mlp_out")
    return made.assign(token="word" + made.position.astype(str), share=share)


def shown(page: str) -> dict:
    return json.loads(re.search(r"const d=(\{.*\}), C=", page)[1])


def test_every_cell_is_in_the_page_at_its_place() -> None:
    with pytest.raises(InputError, match="needs a column 'token'"):
        interactive_map(table(2, 2).drop(columns="token"))
    cells = table(6, 4).drop(index=7)  # layer 1, position 3 of the first site was not measured
    data = shown(interactive_map(cells.assign(low=cells.share - 0.1, high=cells.share + 0.1)))
    assert data["sites"] == ["residual stream", "attention", "MLP"] and data["tokens"][3] == "word3"
    assert data["values"][0][1] == [[0.167, 0.067, 0.267]] * 3 + [None]
    assert data["values"][2][0] == [[-0.25, -0.35, -0.15]] * 4 and data["best"] == [5, 0]


def test_tokens_are_text_and_never_markup() -> None:
    hostile = table(2, 2).assign(token="</script><b>@DATA\"&'")
    page = interactive_map(hostile)
    assert page.count("</script>") == 1 and "<b>" not in page
    assert shown(page)["tokens"][0] == hostile.token[0]
    assert html.unescape(re.search('srcdoc="([^"]*)"', framed(page, 2))[1]) == page


def test_a_page_is_small_reads_nothing_from_outside_and_repeats_its_bytes() -> None:
    wide = table(30, 60)
    page = interactive_map(wide)
    assert len(framed(page, 30)) < 300_000 and page == interactive_map(wide)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"] and "src=" not in page
