"""Tables of the plants: each is there once, its shares add up, and the figure's table averages them."""

import pytest

from companion.calibration import plants
from companion.calibration.campaign import read_shipped


def test_shipped_tables_have_every_plant_once() -> None:
    table = read_shipped("plants")
    wanted = {(plant.kind, plant.seed) for plant in plants.plan_plants()}
    assert {(row.kind, row.seed) for row in table.itertuples()} == wanted
    direct = table[table.effect == "direct"].groupby(["kind", "seed", "treatment"]).share.sum()
    assert direct.between(0.9, 1.1).all(), "shares of the linear contrast add up"


def test_the_figures_table_averages_over_seeds() -> None:
    table = read_shipped("plants")
    made = plants.shares_by_kind(table, "T1").set_index(["kind", "effect", "component"])
    own = table.query(
        "kind == 'attention' and treatment == 'T1' and effect == 'total' and site == 'attn_out' and layer == 4"
    )
    row = made.loc[("attention", plants.MEANING["total"], "attn 4")]
    assert row.learned and [row.low, row.high] == [own.share.min(), own.share.max()]
    assert row.estimate == pytest.approx(own.share.mean()) and len(own) == len(plants.SEEDS)
    top = plants.largest_shares(table)
    assert len(top) == len(plants.plan_plants()) * 4 and (top.share > 0).all()


def test_verdicts_are_tallied_over_the_seeds_of_a_kind() -> None:
    tally = plants.tally_verdicts(read_shipped("plant_evidence"))
    assert list(tally.index) == list(plants.KINDS) and "C1*" in tally
    assert {sum(map(int, cell.split(" / "))) for cell in tally.C1} == {len(plants.SEEDS)}
    assert {sum(map(int, cell.split(" / "))) for cell in tally.C6} == {1}, "one seed of a kind is asked for answers"
