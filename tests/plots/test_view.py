"""The interactive view: one page with every cell's number, the same bytes each time, and nothing from outside."""

import html
import json
import re

import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.plots.view import framed, interactive_map


def table(n_layers: int, n_tokens: int) -> pd.DataFrame:
    sites = ("resid_post", "attn_out", "mlp_out")
    cells = [(s, layer, at, f"word{at}") for s in sites for layer in range(n_layers) for at in range(n_tokens)]
    made = pd.DataFrame(cells, columns=["site", "layer", "position", "token"])
    return made.assign(share=made.layer / n_layers - 0.25 * (made.site == "mlp_out"))


def shown(page: str) -> dict:
    found = re.search(r"const d=(\{.*\}), C=", page)
    assert found
    return json.loads(found[1])


def test_every_cell_is_in_the_page_at_its_place() -> None:
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
    source = re.search('srcdoc="([^"]*)"', framed(page, 2))
    assert source and html.unescape(source[1]) == page


def test_a_page_is_small_reads_nothing_from_outside_and_repeats_its_bytes() -> None:
    wide = table(30, 60)
    page = interactive_map(wide)
    assert len(framed(page, 30)) < 300_000 and page == interactive_map(wide)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"] and "src=" not in page


def test_a_table_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="needs a column 'token'"):
        interactive_map(table(2, 2).drop(columns="token"))
