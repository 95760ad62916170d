"""C4's evidence from planted shares and take-overs; that of C5c is tested with the timed clamps that it rests on."""

import numpy as np
import pandas as pd
import pytest

from companion.evidence.tokens import evidence_c4
from companion.mediation import mechanisms
from companion.mediation.estimands import with_estimands


def planted(share: float, layer_of_takeover: int, n_layers: int = 4) -> pd.DataFrame:
    """Effects of 60 pairs of 30 topics in which MLPs carry a planted share from every layer on."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        te = 4 + rng.normal(0, 0.3)
        for layer in range(n_layers):
            is_last = layer == n_layers - 1
            live = te * (1.0 if is_last else 0.8 if layer >= layer_of_takeover else 0.2)
            above = live if is_last else (1 - share) * live
            effects = (live, live, above, above, 0.2 * live)
            for site, effect in zip(mechanisms.HELD, effects, strict=True):
                topic, split = f"t{i % 30}", "discover" if i % 30 < 15 else "test"
                key = (f"p{i}", topic, "T2", split, site, layer, "last", -1)
                rows += [(*key, outcome, 0.0, effect, te - effect, te) for outcome in ("Y1", "Y1.frozen")]
    names = ["pair_id", "topic", "treatment", "split", "site", "layer", "position", "head", "outcome"]
    made = pd.DataFrame(rows, columns=[*names, "y00", "y01", "y10", "y11"])
    return with_estimands(made)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_planted_take_over_and_its_shares_are_found(layer: int) -> None:
    rows = pd.DataFrame(evidence_c4(planted(0.7, layer), "m", 4)).set_index(["quantity", "variant"])
    assert rows.loc[("hand-over layer", "main"), ["estimate", "ci_low", "ci_high"]].tolist() == [layer] * 3
    for path, share in (("MLPs", 0.7), ("skip", 0.3), ("MLPs from this layer on", 0.8)):
        assert rows.loc[(f"share of {path}", "main"), "estimate"] == pytest.approx(share)


def test_a_take_over_in_the_last_layer_is_not_defined() -> None:
    rows = pd.DataFrame(evidence_c4(planted(0.7, 3), "m", 4))
    assert "no block is left above" in rows.loc[rows.quantity == "not defined", "note"].item()
    assert "main" not in set(rows.loc[rows.quantity == "share of MLPs", "variant"])
    own = rows[(rows.quantity == "share of MLPs from this layer on") & (rows.variant == "main")]
    assert own.estimate.item() == pytest.approx(0.8)
