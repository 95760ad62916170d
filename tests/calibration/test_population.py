"""Verdicts without sampling error: the closed form takes the place of what it knows, and agrees with the model."""

import pandas as pd
import pytest
from measured_organism import KEYS, NUMBERS, few_pairs, gated_organism, measured_organism

from companion.calibration import population
from companion.calibration.campaign import read_shipped


def found(part: str, topics: int, monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], pd.DataFrame]:
    """Evidence rows behind the population verdicts of a part, by claim and rule."""
    monkeypatch.setattr(population, "TOPICS", topics)
    organism = gated_organism()
    verdicts = population.verdicts_without_sampling(organism, few_pairs(organism), measured_organism().rows, part)
    return {key: rows.set_index(KEYS) for key, (_, rows) in verdicts.items()}


def test_population_values_have_no_width_and_leave_the_rest_alone() -> None:
    rows = measured_organism().rows
    made = population.with_values(rows, rows.model.iloc[0], {("C1", "late share", "main"): 0.9})
    changed = (made[NUMBERS] != rows[NUMBERS]).any(axis=1)
    row = made[changed].iloc[0]
    assert changed.sum() == 1 and row.quantity == "late share" and (row[NUMBERS] == 0.9).all()


def test_the_population_agrees_with_a_large_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = found("neurons", 60, monkeypatch)
    assert set(rows) == {("C5a", "registered"), ("C5a", "corrected")}
    at = (gated_organism().name, "C5a", "psi1", "main")
    row, sample = rows["C5a", "registered"].loc[at], measured_organism().rows.set_index(KEYS).loc[at]
    assert row.ci_low == row.ci_high and row.estimate == pytest.approx(sample.estimate, abs=0.2)


def test_c1_to_c4_have_a_population_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, label = found("layers", 30, monkeypatch), gated_organism().name
    assert {("C1", "registered"), ("C2", "registered"), ("C2", "corrected"), ("C4", "corrected")} <= set(rows)
    assert ("C1", "corrected") not in rows, "the closed form does not know where a decision is computed"
    at = [(label, "C1", "late share", "main"), (label, "C2", "MLP share of NIE", "main")]
    replaced = rows["C1", "registered"].loc[at]
    assert (replaced.ci_low == replaced.ci_high).all()
    psi = found("context", 30, monkeypatch)["C3", "registered"].loc[(label, "C3", "psi0 early, shared tokens", "main")]
    assert psi.ci_low == psi.ci_high == psi.estimate


def test_a_stored_draw_gets_its_shipped_population_verdict_again() -> None:
    evidence, stored = read_shipped("evidence"), read_shipped("verdicts").query("purpose == 'main'")
    made = population.measure_population(("neurons", "late", 11), evidence, stored)["population"]
    shipped = read_shipped("population").query("kind == 'late' and seed == 11 and claim == 'C5a'")
    names = ["kind", "claim", "rule", "seed", "population_verdict"]
    by_rule = [table.sort_values("rule", ignore_index=True) for table in (made, shipped)]
    pd.testing.assert_frame_equal(by_rule[0][names], by_rule[1][names], check_dtype=False)
    assert by_rule[0].population.to_list() == pytest.approx(by_rule[1].population.to_list(), rel=1e-3, nan_ok=True)
