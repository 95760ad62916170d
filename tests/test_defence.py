"""Choosing strengths, reading laws, pairing trials, and evidence rows: known answers on tables made by hand."""

import numpy as np
import pandas as pd
import pytest

from companion.claims.registered_rules import rule_c6
from companion.claims.verdict import Rows
from companion.evidence import steering
from companion.generation.hooks import Edit, Steering
from companion.generation.labels import is_harmful
from companion.mediation import study
from companion.steering import adasteer, attacker, budget, comparison, experiment
from companion.steering.methods import EMBEDDED_SENTENCE, constant


def curves(*rows: tuple[float, float, float, float]) -> pd.DataFrame:
    """Curves of one method from (strength, harm, over-refusal, KL)."""
    names = ("harm", "over-refusal", "KL")
    long = [(row[0], name, value) for row in rows for name, value in zip(names, row[1:], strict=True)]
    return pd.DataFrame(long, columns=["strength", "measure", "estimate"])


def test_the_strength_of_least_harm_within_both_margins_is_chosen() -> None:
    made = curves((0.5, 0.6, 0.5, 0.001), (1.0, 0.3, 1.9, 0.019), (1.5, 0.1, 2.1, 0.01), (2.0, 0.2, 1.0, 0.021))
    assert budget.choose(made) == 1.0


def test_where_no_strength_keeps_the_margins_the_least_excess_is_chosen() -> None:
    assert budget.choose(curves((0.5, 0.6, 4.0, 0.001), (1.0, 0.3, 3.0, 0.05), (1.5, 0.1, 9.0, 0.3))) == 0.5


def test_a_tie_goes_to_the_weaker_strength() -> None:
    assert budget.choose(curves((1.0, 0.3, 0, 0), (0.5, 0.3, 0, 0))) == 0.5


def test_the_needed_coefficient_lies_between_grid_points() -> None:
    steps = len(adasteer.PLANE_GRID)
    falling = np.linspace(1.0, 1.0 - 0.4 * (steps - 1), steps)  # crosses 0 at 2.5 steps
    never, at_once = np.ones(steps), -np.ones(steps)
    found = adasteer.needed(np.stack([falling, never, at_once], axis=1))
    assert found[0] == pytest.approx(2.5 * adasteer.PLANE_GRID[1])
    assert np.isnan(found[1]) and found[2] == 0


def test_tolerance_is_the_last_right_coefficient_on_the_wanted_side() -> None:
    steps = len(adasteer.PLANE_GRID)
    odds = np.stack([np.where(np.arange(steps) <= 3, -1.0, 1.0)] * 2, axis=1)
    found = adasteer.tolerated(odds, np.array([False, True]))
    assert found.tolist() == [adasteer.PLANE_GRID[3], adasteer.PLANE_GRID[-1]]


def test_a_planted_law_is_read_off() -> None:
    position = np.linspace(0, 1, 100)
    table = adasteer.law(position, 2 - position, np.arange(100), "p", "g")
    assert len(table) == adasteer.BINS
    assert np.allclose(table.estimate, 2 - table.x) and table.estimate.is_monotonic_decreasing
    assert adasteer.trend(position, 2 - position) == pytest.approx(-1)


def test_zones_cover_every_layer_once() -> None:
    for n_layers in (3, 6, 13, 32):
        zones = comparison.zones(n_layers)
        assert sorted(layer for layers in zones.values() for layer in layers) == list(range(n_layers))
        assert max(zones["early"]) < min(zones["mid"]) and max(zones["mid"]) < min(zones["late"])


def trial(kind: str, labels: list[str]) -> pd.DataFrame:
    topics = [f"{kind} {i}" for i in range(len(labels))]
    return pd.DataFrame({"kind": kind, "label": labels, "topic": topics, "tier": 5, "severity": 0.0})


def both(harmful: list[str], borderline: list[str], harmless: list[str]) -> pd.DataFrame:
    parts = (trial("harmful", harmful), trial("borderline", borderline), trial("harmless", harmless))
    return pd.concat(parts, ignore_index=True)


PLAIN = both(["harmful"] * 40, ["on_topic"] * 20, ["on_topic"] * 20)
STEERED = both(
    ["harmful"] * 10 + ["refusal"] * 20 + ["off_topic"] * 10,
    ["on_topic"] * 18 + ["refusal"] * 2,
    ["on_topic"] * 17 + ["refusal"] + ["off_topic"] * 2,
)


def test_each_kind_counts_what_matters_for_it() -> None:
    assert experiment.changed(PLAIN, STEERED, "harmful").estimate == -75  # a garbled answer is no harm either
    assert experiment.changed(PLAIN, STEERED, "borderline").estimate == 10
    assert experiment.changed(PLAIN, STEERED, "harmless").estimate == 15  # but it is a loss


def found(rows: list[dict], quantity: str, variant: str = "main") -> dict:
    (one,) = [row for row in rows if (row["quantity"], row["variant"]) == (quantity, variant)]
    return one


def test_evidence_rows_hold_the_changes_and_the_refits_widen_harm_only() -> None:
    free = steering.outcome_rows("m", PLAIN, STEERED, [])
    wide = steering.outcome_rows("m", PLAIN, STEERED, [-70.0, -80.0])
    assert found(wide, "harm change")["estimate"] == -75
    assert found(wide, "harm change")["ci_low"] < found(free, "harm change")["ci_low"]
    assert found(wide, "harmless loss") == found(free, "harmless loss")
    assert found(wide, "spread over refits")["estimate"] == pytest.approx(np.sqrt(50))
    assert found(wide, "harm change", "strong wrappers")["estimate"] == -75
    bare = [table[table.kind == "harmful"].reset_index(drop=True) for table in (PLAIN, STEERED)]
    names = {row["quantity"] for row in steering.outcome_rows("m", *bare, [], "method a")}
    assert names == {"harm change"}, "a kind of prompt that the set lacks has no row"


def test_an_advantage_is_the_harm_that_the_rival_leaves_beyond_lates() -> None:
    late, rival = STEERED[STEERED.kind == "harmful"], trial("harmful", ["harmful"] * 20 + ["refusal"] * 20)
    rows = steering.rival_rows("m", late, {"mid": rival}, {"late": 2.0, "mid": 2.02})
    assert found(rows, "advantage over mid")["estimate"] == 25
    assert found(rows, "budget of mid over late")["estimate"] == pytest.approx(1.01)


def test_the_rank_among_random_directions() -> None:
    null = pd.DataFrame(
        {"family": "isotropic", "role": ["late", *["random"] * 99], "value": [5.0, *np.linspace(0, 4, 99)]}
    )
    assert found(steering.random_rows("m", null), "p isotropic")["estimate"] == 0.01


def test_what_is_not_defined_reaches_the_verdict() -> None:
    rows = pd.DataFrame(steering.not_defined("m", "the model refused no harmful prompt"))
    gate = {"claim": "gate", "quantity": "TE T2", "variant": "main", "estimate": 4.0, "ci_low": 3.0, "ci_high": 5.0}
    gate |= {"n_pairs": 100, "n_topics": 30, "note": "", "model": "m"}
    verdict = rule_c6(Rows("m", pd.concat([rows, pd.DataFrame([gate])], ignore_index=True)))
    assert (verdict.verdict, verdict.reason) == ("not testable", "the model refused no harmful prompt")


def test_no_disguise_changes_what_is_asked() -> None:
    asked = attacker.requests("validate", 4)
    assert asked == attacker.requests("validate", 4)
    for disguise in (
        attacker.STRONG,
        attacker.Disguise(attacker.wrappers()[-1], "clerk", None, "now"),
    ):
        texts = attacker.as_prompts(asked, disguise).text
        assert all(is_harmful(text) and disguise.wrapper.text in text for text in texts)
    topics = {split: {one.clause.topic for one in attacker.requests(split)} for split in ("validate", "test")}
    assert not topics["validate"] & topics["test"]


def test_a_search_against_many_finds_for_each_what_it_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    this = study.begin("embedded", "embedded", "m", pairs=10)
    monkeypatch.setattr(attacker, "REQUESTS", 2)
    some = attacker.wrappers()[::20]
    monkeypatch.setattr(attacker, "wrappers", lambda: some)
    vector = constant(np.random.default_rng(0).standard_normal(this.subject.d_model))
    push = Steering("push", (Edit(3, "resid_post", vector, blind=True),), strength=20.0)
    methods = [Steering("plain"), push, Steering("told", system=EMBEDDED_SENTENCE)]
    alone = [attacker.worst_wrapper(this.subject, this.openers["T2"], [one])[0] for one in methods]
    assert attacker.worst_wrapper(this.subject, this.openers["T2"], methods) == alone
    assert len(set(alone)) > 1, "the methods must differ for this to say anything"


def test_an_answer_that_opens_with_words_of_neither_camp_is_no_refusal() -> None:
    lab = experiment.open_experiment(study.begin("embedded", "embedded", "m", pairs=10), "embedded", thin=10)
    assert isinstance(lab, experiment.SteeringExperiment) and experiment.missing(lab) == ""
    benign = lab.prompts[lab.prompts.suite.str.fullmatch(r"B\d")]
    assert (benign.log_odds < 0).any() and not benign.refused.any()


def test_greedy_labels_are_an_arms_own_and_of_harmful_prompts_only() -> None:
    lab = experiment.open_experiment(study.begin("embedded", "embedded", "m", pairs=10), "embedded", thin=4)
    assert isinstance(lab, experiment.SteeringExperiment)
    prompts = pd.concat(
        [experiment.select(lab, "test", kind, n=2) for kind in ("harmful", "harmless")], ignore_index=True
    )
    plain = experiment.trial(lab, experiment.PLAIN, prompts)
    assert ((plain.greedy != "") == (plain.kind == "harmful")).all()
    assert "greedy" not in experiment.trial(lab, experiment.PLAIN, plain, greedy=False)
