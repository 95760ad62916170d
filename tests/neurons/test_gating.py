"""Gate or contributor: indices and shares of tables whose mean cells are known."""

import numpy as np
import pandas as pd
import pytest

from companion.mediation.estimands import CELLS
from companion.neurons import gating


def known_cells(seed: int, treatment: str, signal: float, own: float, together: float) -> pd.DataFrame:
    """120 pairs of 40 topics; the mean cells are known."""
    n = 120
    cells = np.random.default_rng(seed).normal([0.0, own, signal, signal + own + together], 0.05, (n, 4))
    table = pd.DataFrame(cells, columns=list(CELLS)).assign(
        pair_id=[f"{treatment} {i}" for i in range(n)], topic=[f"t{i % 40}" for i in range(n)], treatment=treatment,
        split=["discover" if i % 40 < 20 else "test" for i in range(n)], set="set", layer=3, form="upstream", outcome="Y1",
    )  # fmt: skip
    return table.assign(te=table.y11 - table.y00)


@pytest.mark.parametrize(("sign", "low"), [(1, 0.2), (-1, 0.2), (1, -0.1), (-1, -0.1)])
def test_an_absolute_interval_holds_zero_where_the_signed_one_does(sign: int, low: float) -> None:
    signed = [sign * 0.3, *sorted((sign * low, sign * 0.7))]
    assert gating.absolute(*signed) == (0.3, max(low, 0.0), 0.7)


def test_index_of_known_means_and_when_it_is_defined() -> None:
    index = gating.gate_index(known_cells(0, "T2", 1.0, 1.0, 2.0))
    assert index.is_defined and index.low < 0.5 < index.high
    assert index.estimate == pytest.approx(0.5, abs=0.02) and index.high - index.low < 0.1
    idle, swamped = known_cells(1, "T2", 1.0, 0.1, 0.0), known_cells(2, "T2", 1.0, 1.0, 2.0).assign(te=100.0)
    for table in (idle, swamped):  # the set does next to nothing; next to nothing is at stake
        assert not gating.gate_index(table).is_defined
    assert gating.gate_index(swamped[swamped.split == "test"]) is None


def test_shares_are_ratios_of_means() -> None:
    against = known_cells(2, "B2", 1.0, -0.8, 0.0)  # against its behaviour: still an effect
    table = pd.concat([known_cells(0, "T2", 1.0, 2.0, 0.0), known_cells(1, "B1", 1.0, 0.4, 0.0), against])
    assert gating.benign_share(table, "T2", "set", ["B1", "B2"]).estimate[0] == pytest.approx(0.3, abs=0.02)
    assert gating.benign_share(table, "T2", "set", []) is None
    table = known_cells(0, "T2", 1.0, 1.0, 0.0)
    table = table.assign(first=table.y01 - table.y00, every=table.y11 - table.y00)
    share = gating.timing_share(table, "T2", "set")
    assert share.low[0] < 0.5 < share.high[0] and share.estimate[0] == pytest.approx(0.5, abs=0.02)
    cost = pd.DataFrame({"topic": list("aabbcc"), "set": "set", "lost": [0.0, 0.3] * 3, "n_tokens": [1.0, 2.0] * 3})
    ratio = gating.perplexity_ratio(cost, "set")
    assert ratio.estimate[0] == pytest.approx(np.exp(0.1))
