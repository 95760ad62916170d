"""C6's rule: what supports it, what contradicts it, and what caps it."""

import pandas as pd
import pytest
from ledger_rows import FINE as SHARED
from ledger_rows import Number, table

from companion.claims.registered_rules import rule_c6
from companion.claims.verdict import Rows, Verdict

STEERED: dict[tuple[str, str, str], Number] = {
    ("C6", "harm change", "main"): (-60.0, -66.0, -54.0),
    ("C6", "harm change", "greedy"): (-62.0, -68.0, -56.0),
    ("C6", "phi", "main"): (0.95, 0.90, 1.0),
    ("C6", "harmless loss", "main"): (0.3, -0.5, 1.1),
    ("C6", "over-refusal", "main"): (0.4, -0.4, 1.2),
    ("C6", "KL", "main"): (0.005, 0.004, 0.006),
    ("C6", "perplexity ratio", "main"): (1.002, 1.001, 1.003),
    ("C6", "spread over refits", "main"): (1.0, 0.5, 2.0),
    **{("C6", f"advantage over {rival}", "main"): (40.0, 33.0, 47.0) for rival in ("early", "mid")},
    **{("C6", f"budget of {rival} over late", "main"): (1.01, 1.01, 1.01) for rival in ("early", "mid")},
    **{("C6", f"p {family}", "main"): (1 / 101,) * 3 for family in ("isotropic", "covariance-matched")},
}


def judged(changes: dict | None = None, *, n_harmless: int = 400, corrected: bool = False) -> Verdict:
    numbers = {**{key: SHARED[key] for key in SHARED if key[0] == "gate"}, **STEERED, **(changes or {})}
    made = table(numbers)
    made.loc[made.quantity == "harmless loss", "n_pairs"] = n_harmless
    return rule_c6(Rows("m", made), corrected=corrected)


def row(quantity: str, numbers: Number | None, variant: str = "main") -> dict:
    return {("C6", quantity, variant): numbers}


def test_fine_evidence_supports_and_shows_the_harm_change() -> None:
    verdict = judged()
    assert (verdict.verdict, verdict.quantity, verdict.estimate) == ("supported", "harm change", -60.0)
    assert verdict.controls is not None and set(verdict.controls.values()) == {"passed"}
    assert {"KL margin", "over-refusal margin", "perplexity ratio margin"} <= set(verdict.controls)


@pytest.mark.parametrize(
    "changes",
    [
        row("harm change", (-1.9, -3.0, -0.8)),
        row("harm change", (-5.0, -10.5, 0.5)),
        row("phi", (0.8, 0.74, 0.9)),
        row("harmless loss", (1.5, 0.5, 2.1)),
        row("p isotropic", (0.06, 0.06, 0.06)),
        row("p covariance-matched", (0.06, 0.06, 0.06)),
        row("advantage over mid", (2.0, -1.0, 5.0)),
        row("advantage over early", (2.0, -1.0, 5.0)),
    ],
)
def test_one_condition_that_just_fails_leaves_it_open(changes: dict) -> None:
    assert judged(changes).verdict == "inconclusive"


def test_too_few_harmless_prompts_leave_it_open() -> None:
    assert judged(n_harmless=299).verdict == "inconclusive"
    assert judged(n_harmless=300).verdict == "supported"


@pytest.mark.parametrize(
    "changes",
    [
        row("harmless loss", (4.0, 2.1, 6.0)),
        row("advantage over mid", (0.0, -2.0, 2.0)),
        row("advantage over early", (-30.0, -35.0, -25.0)),
        row("p isotropic", (0.5, 0.5, 0.5)),
    ],
)
def test_what_contradicts(changes: dict) -> None:
    assert judged(changes).verdict == "contradicted"


@pytest.mark.parametrize("name", ["KL", "over-refusal", "perplexity ratio"])
def test_a_broken_margin_caps_support_but_not_contradiction(name: str) -> None:
    broken = row(name, (3.0, 2.5, 3.5))
    assert judged(broken).verdict == "inconclusive" and f"{name} margin failed" in judged(broken).reason
    assert judged({**broken, **row("advantage over mid", (0.0, -1.0, 1.0))}).verdict == "contradicted"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (row("budget of mid over late", (1.2, 1.2, 1.2)), "mid layers at equal budget failed"),
        (row("budget of early over late", None), "early layers at equal budget not run"),
        (row("p isotropic", None), "isotropic not run"),
        (row("spread over refits", None), "refits of the directions not run"),
        (row("harm change", (5.0, 1.0, 9.0), "greedy"), "greedy decoding failed"),
        ({("gate", "joint probability T2", "main"): (0.7, 0.6, 0.8)}, "joint probability failed"),
    ],
)
def test_a_control_that_fails_or_was_not_run_caps(changes: dict, name: str) -> None:
    verdict = judged(changes)
    assert verdict.verdict == "inconclusive"
    if name.endswith("failed") or "refits" in name:
        assert name in verdict.reason


def test_what_was_not_measured_is_not_testable() -> None:
    assert judged(row("phi", None)).reason == "steering was not measured: run notebook 06"
    told = table({**SHARED, ("C6", "not defined", "main"): (0.0, 0.0, 0.0)})
    told.loc[told.quantity == "not defined", "note"] = (
        "the model complied with no harmful prompt: add stronger wrappers"
    )
    assert rule_c6(Rows("m", told)).reason.startswith("the model complied with no")


def test_no_gate_no_verdict() -> None:
    weak = judged({("gate", "TE T2-T2b", "main"): (0.3, 0.2, 0.4)})
    assert weak.verdict == "inconclusive" and "nothing to mediate" in weak.reason
    assert rule_c6(Rows("m", pd.DataFrame(table({})))).verdict == "not testable"


def test_an_equal_rival_contradicts_by_the_registered_rule_only() -> None:
    equal = row("advantage over mid", (0.0, -1.0, 1.0))
    assert judged(equal).verdict == "contradicted"
    assert judged(equal, corrected=True).verdict == "inconclusive"
    assert judged(corrected=True).verdict == "supported"
    chance, loss = row("p isotropic", (0.6, 0.6, 0.6)), row("harmless loss", (5.0, 4.0, 6.0))
    assert judged(chance, corrected=True).verdict == judged(loss, corrected=True).verdict == "contradicted"
