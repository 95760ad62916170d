"""Verdicts without sampling error: the closed form takes the place of what it knows, and agrees with the model."""

import pandas as pd
import pytest
from measured_organism import KEYS, NUMBERS, few_pairs, gated_organism, measured_organism

from companion.calibration import population
from companion.calibration.campaign import read_shipped

BOTH = ("registered", "corrected")


# The corrected C1 has none: the closed form does not know where a decision is computed.
@pytest.mark.parametrize(
    ("part", "topics", "said", "known"),
    [
        ("neurons", 60, {("C5a", rule) for rule in BOTH}, [("C5a", "psi1")]),
        ("context", 30, {("C3", rule) for rule in BOTH}, [("C3", "psi0 early, shared tokens")]),
        ("layers", 30, {("C1", "registered"), *(("C2", rule) for rule in BOTH), ("C4", "corrected")},
         [("C1", "late share"), ("C2", "MLP share of NIE")]),
    ],
)  # fmt: skip
def test_the_closed_form_takes_the_place_of_what_it_knows_and_agrees_with_the_sample(
    part: str, topics: int, said: set, known: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "TOPICS", topics)
    organism, rows = gated_organism(), measured_organism().rows
    verdicts = population.verdicts_without_sampling(organism, few_pairs(organism), rows, part)
    assert said <= set(verdicts) and set(verdicts) - said <= {("C4", "registered")}
    at = [(organism.name, *one, "main") for one in known]
    replaced, sample = (table.set_index(KEYS) for table in (verdicts[min(said)][1], rows))
    assert (replaced.loc[at, "ci_low"] == replaced.loc[at, "estimate"]).all()
    assert (replaced.loc[at, "ci_high"] == replaced.loc[at, "estimate"]).all()
    assert replaced.loc[at, "estimate"].to_list() == pytest.approx(sample.loc[at, "estimate"].to_list(), abs=0.2)
    rest = sample.index[~sample.index.get_level_values("claim").isin({"gate", *population.CLAIMS[part]})]
    pd.testing.assert_frame_equal(replaced.loc[rest, NUMBERS], sample.loc[rest, NUMBERS])


def test_a_stored_draw_gets_its_shipped_population_verdict_again() -> None:
    evidence, stored = read_shipped("evidence"), read_shipped("verdicts").query("purpose == 'main'")
    made = population.measure_population(("neurons", "late", 11), evidence, stored)["population"]
    shipped = read_shipped("population").query("kind == 'late' and seed == 11 and claim == 'C5a'")
    names = ["kind", "claim", "rule", "seed", "population_verdict"]
    by_rule = [table.sort_values("rule", ignore_index=True) for table in (made, shipped)]
    pd.testing.assert_frame_equal(by_rule[0][names], by_rule[1][names], check_dtype=False)
    assert by_rule[0].population.to_list() == pytest.approx(by_rule[1].population.to_list(), rel=1e-3, nan_ok=True)
