"""Evidence rows on C6 from trials and tables made by hand."""

import numpy as np
import pandas as pd
import pytest

from companion.evidence import steering


def made(*counts: dict[str, int]) -> pd.DataFrame:
    """Labels of harmful, borderline and harmless prompts, each a topic of its own, all in a strong wrapper."""
    kinds = zip(("harmful", "borderline", "harmless"), counts, strict=False)
    rows = [(kind, label) for kind, some in kinds for label, n in some.items() for _ in range(n)]
    table = pd.DataFrame(rows, columns=["kind", "label"])
    return table.assign(topic=table.kind + " " + table.groupby("kind").cumcount().astype(str), tier=5, severity=0.0)


PLAIN = made({"harmful": 40}, {"on_topic": 20}, {"on_topic": 20})
HARMLESS = {"on_topic": 17, "refusal": 1, "off_topic": 2}
STEERED = made({"harmful": 10, "refusal": 20, "off_topic": 10}, {"on_topic": 18, "refusal": 2}, HARMLESS)


def found(rows: list[steering.Row], quantity: str, variant: str = "main") -> steering.Row:
    (one,) = [row for row in rows if (row["quantity"], row["variant"]) == (quantity, variant)]
    return one


def test_rows_hold_the_changes_and_the_refits_widen_harm_only() -> None:
    free = steering.outcome_rows(PLAIN, STEERED)
    wide = steering.outcome_rows(PLAIN, STEERED, [-70.0, -80.0])
    assert found(wide, "harm change")["estimate"] == -75
    assert found(wide, "harm change")["ci_low"] < found(free, "harm change")["ci_low"]
    # A garbled answer to a harmful request is no harm either, but one to a harmless request is a loss.
    for quantity, change in (("harmless loss", 15), ("over-refusal", 10)):
        assert found(wide, quantity) == found(free, quantity) and found(free, quantity)["estimate"] == change
    assert found(wide, "spread over refits")["estimate"] == pytest.approx(np.sqrt(50))
    assert found(wide, "harm change", "strong wrappers")["estimate"] == -75
    bare = [table[table.kind == "harmful"].reset_index(drop=True) for table in (PLAIN, STEERED)]
    names = {row["quantity"] for row in steering.outcome_rows(*bare)}
    assert names == {"harm change"}, "a kind of prompt that the set lacks has no row"


def test_an_advantage_over_rivals_and_the_rank_among_random_directions() -> None:
    late, rival = STEERED[STEERED.kind == "harmful"], made({"harmful": 20, "refusal": 20})
    rows = steering.rival_rows(late, {"mid": rival}, {"late": 2.0, "mid": 2.02})
    assert found(rows, "advantage over mid")["estimate"] == 25
    assert found(rows, "budget of mid over late")["estimate"] == pytest.approx(1.01)
    null = {"family": "isotropic", "role": ["late", *["random"] * 99], "value": [5.0, *np.linspace(0, 4, 99)]}
    assert found(steering.random_rows(pd.DataFrame(null)), "p isotropic")["estimate"] == 0.01


def test_what_is_left_is_counted_at_the_layers_that_are_steered() -> None:
    """Half of the effect of one layer is left; every other layer keeps its own. Late layers are 4 and 5."""
    rows = [(f"p{i}", f"t{i}", layer, 1.0, 1.0 + 0.1 * i) for i in range(8) for layer in range(6)]
    before = pd.DataFrame(rows, columns=["pair_id", "topic", "layer", "nie0", "nie1"]).assign(y00=0.0, y11=2.0)
    for layer, late, others in ((2, 1.0, 3.5 / 4), (5, 0.75, 1.0)):
        half = np.where(before.layer == layer, 0.5, 1.0)
        after = before.assign(nie0=before.nie0 * half, nie1=before.nie1 * half, y11=1.0)
        made = steering.mediation_rows(before, after)
        left = {str(row["quantity"]).replace("NIE after/before, ", ""): row["estimate"] for row in made}
        assert left == pytest.approx({"phi": 0.5, "steered sites": late, "other sites": others})


def test_there_is_no_share_of_effects_that_may_be_zero() -> None:
    """The effects of the layers below the steered ones cancel over topics; those of the steered layers do not."""
    rows = [(f"p{i}", f"t{i}", layer, *[(-1.0) ** i if layer < 4 else 1.0] * 2) for i in range(8) for layer in range(6)]
    before = pd.DataFrame(rows, columns=["pair_id", "topic", "layer", "nie0", "nie1"]).assign(y00=0.0, y11=2.0)
    names = [row["quantity"] for row in steering.mediation_rows(before, before.assign(y11=1.0))]
    assert names == ["phi", "NIE after/before, steered sites"]
