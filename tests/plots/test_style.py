"""The kinds of drawing: what is drawn where, and readable without colour."""

import numpy as np
import pandas as pd
import pytest
from figure_tables import numbers, table_for

from companion.base.thresholds import COMPONENTS
from companion.plots import calibration, layers, style
from companion.plots.figures import spec_of

WORDS = {"x_label": "cost", "y_label": "harm", "title": ""}


def test_an_interval_beside_its_estimate_is_drawn_where_it_is() -> None:
    """A BCa interval of a skewed statistic need not hold the estimate."""
    limits = {"estimate": [0.0, 1.0, 2.0], "low": [0.35, 0.5, 1.0], "high": [0.6, 0.8, 3.0]}
    table = pd.DataFrame({"layer": [0, 1, 2], "site": "mlp_out", **limits})
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
        other = table.assign(model=table.model.str.replace("embedded", "full-0"), earliest=0.0)
        figure = style.cumulative(pd.concat([table.assign(earliest=earliest), other]))
        ax, right = figure.axes
        assert [one.get_title() for one in figure.axes] == ["embedded", "full-0"] and not right.patches
        assert [text.get_text() for text in right.get_legend().get_texts()] == ["trained", "untrained twin"]
        assert len(ax.patches) == n_shaded and bool(ax.texts) == bool(n_shaded)
        if n_shaded:
            assert ax.patches[0].get_x() + ax.patches[0].get_width() == earliest - 0.5


def test_answers_are_told_by_words_and_numbers_too() -> None:
    said = ["supported", "contradicted", "cannot tell", "not testable"]
    table = pd.DataFrame(
        {"model": list("mmnn"), "claim": ["C2", "C1", "C1", "C2"], "answer": said, "name": "few neurons"}
    )
    ax = style.answers(table.assign(number=["9 %", "15 neurons", "3.0 points", np.nan])).axes[0]
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (1, 0): "yes\n9 %", (0, 0): "no\n15 neur.", (0, 1): "3.0 pts",
    }  # fmt: skip
    cells = {patch.get_xy(): patch.get_hatch() for patch in ax.patches if patch.get_width()}
    assert len(cells) == 3 and sum(hatch is not None for hatch in cells.values()) == 1
    assert [label.get_text().split("\n")[0] for label in ax.get_xticklabels()] == ["C1", "C2"]
    assert all(text.get_fontsize() >= 8 for text in (*ax.texts, *ax.get_xticklabels()))


def test_tokens_that_differ_are_outlined() -> None:
    texts = {"group": ["header", "verb", "rest"], "control": list("abc"), "treated": list("adc")}
    table = pd.DataFrame({"position": range(3), **texts, "differ": [False, True, False]})
    (ax,) = layers.pair_tokens(table).axes
    wide = {patch.get_x() for patch in ax.patches if patch.get_linewidth() > 1}
    assert wide == {0}, "the user's turn begins at 0, right of what all prompts share"
    shown = {text.get_text() for text in ax.texts}
    assert {"b", "c", "d", "control", "treated", "verb"} <= shown and "a" not in shown
    assert any(text.startswith("1 tokens") for text in shown)


def test_a_component_map_has_a_number_in_every_cell() -> None:
    rows = [
        (layer, site, share) for layer in range(30) for site, share in (("mlp_out", 0.25), ("attn_out", -0.004 * layer))
    ]
    ax = layers.component_map(pd.DataFrame(rows, columns=["layer", "site", "share"])).axes[0]
    said = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(said) == 60 and said[29, 1] == "25" and said[29, 0] == "\N{MINUS SIGN}12" and said[1, 0] == "0"
    assert ax.images[0].get_clim() == (-25, 25)


def test_a_row_of_one_group_is_drawn_at_its_label() -> None:
    rows = [("both", "a", 1.0), ("both", "b", 2.0), ("one", "b", 3.0)]
    table = pd.DataFrame(rows, columns=["row", "group", "estimate"]).assign(low=0.0, high=4.0)
    ax = style.dots(table, row="row", group="group", title="", unit="").axes[0]
    at = {x: y for line in ax.get_lines() for x, y in line.get_xydata().tolist() if x in (1.0, 2.0, 3.0)}
    assert at[3.0] == 1.0 and at[1.0] < 0.0 < at[2.0]


def test_what_decides_is_framed() -> None:
    rows = [(layer, site, "", 0.5) for layer in range(3) for site in COMPONENTS]
    table = pd.DataFrame(rows, columns=["layer", "site", "role", "share"]).assign(model="A")
    table.loc[3, "role"] = "decides"
    (frame,) = calibration.built(table).axes[0].patches
    assert (frame.get_x(), frame.get_y()) == pytest.approx((0.53, 0.55))
