"""The ledger's rules: every verdict of C1, C2 and C3, every control that caps it, gates, tags and the ledger's files."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import claims, controls, ledger, store
from helpers.claims import Verdict
from helpers.controls import UNTRAINED, Rows
from helpers.errors import InputError

Number = tuple[float, float, float]
FINE: dict[tuple[str, str, str], Number] = {
    ("gate", "TE T1", "main"): (-3.0, -3.3, -2.7),
    ("gate", "TE T2", "main"): (4.0, 3.7, 4.3),
    ("gate", "TE T2-T2b", "main"): (2.0, 1.8, 2.2),
    ("gate", "joint probability T1", "main"): (0.97, 0.96, 0.98),
    ("gate", "joint probability T2", "main"): (0.95, 0.94, 0.96),
    ("gate", "earliest possible depth", "main"): (0.25, 0.2, 0.3),
    **{
        ("C1", "late share", variant): (0.7, 0.6, 0.8)
        for variant in ("main", "sufficiency", "necessity", "full response", "norm frozen", "unsaturated")
    },
    ("C1", "centroid difference", "main"): (0.2, 0.1, 0.3),
    **{("C1", f"centroid B{i}", "main"): (0.5, 0.4, 0.6) for i in range(1, 6)},
    **{
        ("C2", "MLP share of NIE", variant): (0.8, 0.7, 0.9)
        for variant in (
            "main", "sufficiency", "necessity", "full response", "norm frozen", "unsaturated", "per patch norm",
            "per parameter",
        )
    },
    **{
        ("C2", "MLP share of direct effects", variant): (0.85, 0.75, 0.95)
        for variant in ("main", "per patch norm", "per parameter")
    },
    ("C3", "psi0 early, shared tokens", "main"): (0.6, 0.5, 0.7),
    ("C3", "psi0 early, shared tokens", "unsaturated"): (0.5, 0.4, 0.6),
    ("C3", "AUROC probe", "main"): (0.9, 0.85, 0.95),
    ("C3", "AUROC bag of tokens", "main"): (0.7, 0.6, 0.8),
    ("C3", "AUROC gain", "main"): (0.2, 0.1, 0.3),
}  # fmt: skip
TWIN: dict[tuple[str, str, str], Number] = {
    ("gate", "TE T2-T2b", "main"): (0.0, -0.1, 0.1),
    ("C1", "late share", "main"): (0.6, 0.55, 0.65),
    ("C1", "centroid difference", "main"): (0.0, -0.1, 0.1),
}
NIE, DIRECT, PSI = "MLP share of NIE", "MLP share of direct effects", "psi0 early, shared tokens"


def table(numbers: dict, model: str = "m", n_topics: int = 36) -> pd.DataFrame:
    rows = [(model, *key, *values, 2 * n_topics, n_topics, "") for key, values in numbers.items() if values is not None]
    return pd.DataFrame(rows, columns=list(store.EVIDENCE))


def judge(
    claim: str, changes: dict | None = None, twin: dict | None = None, n_topics: int = 36, *, with_twin: bool = True
) -> Verdict:
    """The verdict on fine evidence with some rows changed, or taken away by None."""
    own = table({**FINE, **(changes or {})}, n_topics=n_topics)
    other = table({**TWIN, **(twin or {})}, "m" + UNTRAINED) if with_twin else table({}, "m" + UNTRAINED)
    found = [one for one in ledger.ledger(pd.concat([other, own], ignore_index=True)) if one.claim == claim]
    (verdict,) = found
    assert verdict.model == "m"
    return verdict


def row(claim: str, quantity: str, numbers: Number | None, variant: str = "main") -> dict:
    return {(claim, quantity, variant): numbers}


# ---- C1 ----


def test_c1_supported() -> None:
    made = judge("C1")
    assert made.verdict == "supported"
    assert (made.quantity, made.estimate, made.ci_low, made.ci_high) == ("late share", 0.7, 0.6, 0.8)
    assert (made.n_pairs, made.n_topics) == (72, 36)
    assert set(made.controls.values()) == {"passed"}
    assert made.tags == ("robust",)
    assert "0.70 [0.60, 0.80]" in made.reason
    assert "0.20 [0.10, 0.30]" in made.reason


C1_RULE = {
    "share at the threshold": ((0.7, 0.5, 0.8), (0.2, 0.05, 0.3), "supported"),
    "share too wide": ((0.7, 0.49, 0.8), (0.2, 0.1, 0.3), "inconclusive"),
    "centroid too wide": ((0.7, 0.6, 0.8), (0.2, 0.04, 0.3), "inconclusive"),
    "centroid covers 0": ((0.7, 0.6, 0.8), (0.1, -0.1, 0.3), "inconclusive"),
    "early": ((0.3, 0.2, 0.4), (0.2, 0.1, 0.3), "contradicted"),
    "early, too wide": ((0.3, 0.2, 0.41), (0.2, 0.1, 0.3), "inconclusive"),
    "no later than benign": ((0.7, 0.6, 0.8), (-0.1, -0.2, 0.0), "contradicted"),
    "no later, too wide": ((0.7, 0.6, 0.8), (-0.1, -0.2, 0.01), "inconclusive"),
    "without limits": ((0.7, -math.inf, math.inf), (0.2, 0.1, 0.3), "inconclusive"),
    "not a number": ((0.7, math.nan, math.nan), (0.2, 0.1, 0.3), "inconclusive"),
}  # fmt: skip


@pytest.mark.parametrize("case", C1_RULE)
def test_c1_rule(case: str) -> None:
    share, centroid, verdict = C1_RULE[case]
    shares = {("C1", "late share", variant): share for variant in ("main", "norm frozen", "unsaturated")}
    assert judge("C1", shares | row("C1", "centroid difference", centroid)).verdict == verdict


C1_CONTROLS = {
    "benign behaviours, failed": (row("C1", "centroid B5", None), {}),
    "benign behaviours, not run": (row("C1", "centroid difference", None) | {("C1", "late share", "main"): (0.3, 0.2, 0.4)}
                                   | {("C1", "late share", v): (0.3, 0.2, 0.4) for v in ("norm frozen", "unsaturated")}, {}),
    "untrained twin, failed": ({}, row("C1", "centroid difference", (0.1, 0.05, 0.2))),
    "final norm frozen, failed": (row("C1", "late share", (0.45, 0.3, 0.6), "norm frozen"), {}),
    "final norm frozen, not run": (row("C1", "late share", None, "norm frozen"), {}),
    "unsaturated pairs, failed": (row("C1", "late share", (0.45, 0.3, 0.6), "unsaturated"), {}),
    "unsaturated pairs, not run": (row("C1", "late share", None, "unsaturated"), {}),
    "joint probability, failed": (row("gate", "joint probability T2", (0.79, 0.7, 0.9)), {}),
    "joint probability, not run": (row("gate", "joint probability T2", None), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", C1_CONTROLS)
def test_c1_controls_cap(case: str) -> None:
    changes, twin = C1_CONTROLS[case]
    made = judge("C1", changes, twin)
    name, state = case.split(", ")
    assert made.verdict == "inconclusive"
    assert made.controls[name] == state
    assert {other for key, other in made.controls.items() if key != name} == {"passed"}
    assert f"by its numbers, capped: {name} {state}" in made.reason
    assert "robust" not in made.tags


def test_c1_without_an_untrained_twin() -> None:
    made = judge("C1", with_twin=False)
    assert made.verdict == "inconclusive"
    assert made.controls["untrained twin"] == "not run"


def test_an_untrained_twin_without_effects_passes() -> None:
    for quantity in ("late share", "centroid difference"):
        assert judge("C1", twin=row("C1", quantity, None)).verdict == "supported"


def test_an_untrained_twin_that_is_only_late_passes() -> None:
    """Any network's components are late to some degree: the rule asks for more than that."""
    made = judge("C1", twin=row("C1", "late share", (0.99, 0.98, 1.0)))
    assert made.verdict == "supported"


def test_a_control_caps_a_contradiction_too() -> None:
    early = {("C1", "late share", variant): (0.3, 0.2, 0.4) for variant in ("main", "norm frozen", "unsaturated")}
    assert judge("C1", early).verdict == "contradicted"
    made = judge("C1", early | row("gate", "joint probability T2", None))
    assert made.verdict == "inconclusive"
    assert "contradicted by its numbers" in made.reason


def test_an_open_question_is_not_called_capped() -> None:
    made = judge("C1", row("C1", "centroid difference", (0.1, -0.1, 0.3)) | row("gate", "joint probability T2", None))
    assert made.verdict == "inconclusive"
    assert "capped" not in made.reason


def test_c1_without_benign_behaviours() -> None:
    made = judge("C1", row("C1", "centroid difference", None))
    assert made.verdict == "inconclusive"
    assert "no benign behaviour to compare with" in made.reason


def test_c1_without_any_positive_component() -> None:
    made = judge("C1", {key: None for key in FINE if key[:2] == ("C1", "late share")})
    assert made.verdict == "inconclusive"
    assert "no component has a positive effect" in made.reason


def test_benign_behaviours_of_any_name_count() -> None:
    renamed = {("C1", f"centroid B{i}", "main"): None for i in range(1, 6)}
    renamed |= {("C1", f"centroid {name}", "main"): (0.5, 0.4, 0.6) for name in ("B1", "B10", "Btone", "B-unit", "B3")}
    assert judge("C1", renamed).controls["benign behaviours"] == "passed"


# ---- C2 ----


def test_c2_supported() -> None:
    made = judge("C2")
    assert made.verdict == "supported"
    assert (made.quantity, made.estimate) == (NIE, 0.8)
    assert made.tags == ("robust",)
    assert "the same side in every normalisation" in made.reason


def shares(total: Number, direct: Number) -> dict:
    variants = ("main", "norm frozen", "unsaturated", "per patch norm", "per parameter")
    return {("C2", NIE, v): total for v in variants} | {("C2", DIRECT, v): direct for v in variants}


C2_RULE = {
    "at the threshold": ((0.7, 0.6, 0.8), (0.7, 0.6, 0.8), "supported"),
    "total too wide": ((0.7, 0.59, 0.8), (0.8, 0.7, 0.9), "inconclusive"),
    "direct too wide": ((0.8, 0.7, 0.9), (0.7, 0.59, 0.8), "inconclusive"),
    "attention": ((0.4, 0.3, 0.5), (0.3, 0.2, 0.4), "contradicted"),
    "attention in one of the two": ((0.4, 0.3, 0.5), (0.8, 0.7, 0.9), "inconclusive"),
    "attention, too wide": ((0.4, 0.3, 0.51), (0.3, 0.2, 0.4), "inconclusive"),
    "not a number": ((0.8, math.nan, math.nan), (0.8, 0.7, 0.9), "inconclusive"),
}


@pytest.mark.parametrize("case", C2_RULE)
def test_c2_rule(case: str) -> None:
    total, direct, verdict = C2_RULE[case]
    assert judge("C2", shares(total, direct)).verdict == verdict


def test_c2_shows_the_number_that_decides() -> None:
    assert judge("C2", shares((0.9, 0.8, 1.0), (0.8, 0.7, 0.9))).quantity == DIRECT
    against = judge("C2", shares((0.45, 0.4, 0.5), (0.3, 0.25, 0.35)))
    assert (against.verdict, against.quantity) == ("contradicted", NIE)
    against = judge("C2", shares((0.3, 0.25, 0.35), (0.3, 0.1, 0.49)))
    assert (against.verdict, against.quantity) == ("contradicted", DIRECT)


C2_CONTROLS = {
    "final norm frozen, failed": row("C2", NIE, (0.45, 0.4, 0.6), "norm frozen"),
    "final norm frozen, not run": row("C2", NIE, None, "norm frozen"),
    "unsaturated pairs, failed": row("C2", NIE, (0.45, 0.4, 0.6), "unsaturated"),
    "unsaturated pairs, not run": row("C2", NIE, None, "unsaturated"),
    "per patch norm, not run": row("C2", NIE, None, "per patch norm"),
    "per parameter, not run": row("C2", NIE, None, "per parameter"),
    "joint probability, failed": row("gate", "joint probability T2", (0.5, 0.4, 0.6)),
    "joint probability, not run": row("gate", "joint probability T2", None),
}


@pytest.mark.parametrize("case", C2_CONTROLS)
def test_c2_controls_cap(case: str) -> None:
    made = judge("C2", C2_CONTROLS[case])
    name, state = case.split(", ")
    assert made.verdict == "inconclusive"
    assert made.controls[name] == state
    assert f"capped: {name} {state}" in made.reason


@pytest.mark.parametrize("quantity", [NIE, DIRECT])
@pytest.mark.parametrize("name", ["per patch norm", "per parameter"])
def test_c2_names_a_normalisation_that_turns_it(quantity: str, name: str) -> None:
    made = judge("C2", row("C2", quantity, (0.4, 0.3, 0.5), name))
    assert made.verdict == "supported"  # the raw shares decide, but the reader is told
    assert "normalisation-dependent" in made.tags
    assert f"the side changes {name}" in made.reason


def test_c2_without_notebook_03() -> None:
    made = judge("C2", {key: None for key in FINE if key[0] == "C2"})
    assert made.verdict == "not testable"
    assert "notebook 03" in made.reason


# ---- C3 ----


def test_c3_supported() -> None:
    made = judge("C3")
    assert made.verdict == "supported"
    assert (made.quantity, made.estimate) == (PSI, 0.6)
    assert made.tags == ()


C3_RULE = {
    "psi at the threshold": ((0.4, 0.3, 0.5), (0.1, 0.01, 0.2), "supported"),
    "psi too wide": ((0.4, 0.29, 0.5), (0.1, 0.01, 0.2), "inconclusive"),
    "gain too small": ((0.6, 0.5, 0.7), (0.049, 0.01, 0.1), "inconclusive"),
    "gain covers 0": ((0.6, 0.5, 0.7), (0.2, -0.01, 0.4), "inconclusive"),
    "no early context": ((0.05, 0.0, 0.1), (0.1, 0.01, 0.2), "contradicted"),
    "no early context, too wide": ((0.05, 0.0, 0.11), (0.1, 0.01, 0.2), "inconclusive"),
}


@pytest.mark.parametrize("case", C3_RULE)
def test_c3_rule(case: str) -> None:
    psi, gain, verdict = C3_RULE[case]
    assert judge("C3", row("C3", PSI, psi) | row("C3", "AUROC gain", gain)).verdict == verdict


C3_CONTROLS = {
    "probe above chance on held-out topics, failed": row("C3", "AUROC probe", (0.6, 0.5, 0.7)),
    "probe above chance on held-out topics, not run": row("C3", "AUROC probe", None),
    "joint probability, failed": row("gate", "joint probability T1", (0.5, 0.4, 0.6)),
    "joint probability, not run": row("gate", "joint probability T1", None),
    "sign in unsaturated pairs, failed": row("C3", PSI, (-0.1, -0.2, 0.0), "unsaturated"),
    "sign in unsaturated pairs, not run": row("C3", PSI, None, "unsaturated"),
}


@pytest.mark.parametrize("case", C3_CONTROLS)
def test_c3_controls_cap(case: str) -> None:
    made = judge("C3", C3_CONTROLS[case])
    name, state = case.split(", ")
    assert made.verdict == "inconclusive"
    assert made.controls[name] == state


@pytest.mark.parametrize("quantity", [PSI, "AUROC gain"])
def test_c3_not_measured(quantity: str) -> None:
    assert judge("C3", row("C3", quantity, None)).verdict == "not testable"


# ---- gates, twins, tags ----

GATES = {"C1": "T2-T2b", "C2": "T2-T2b", "C3": "T1"}


@pytest.mark.parametrize("claim", GATES)
def test_the_gate_asks_for_topics(claim: str) -> None:
    assert judge(claim, n_topics=20).verdict == "supported"
    made = judge(claim, n_topics=19)
    assert made.verdict == "inconclusive"
    assert made.reason == f"19 topics of {GATES[claim]} in the test split, 20 needed"


@pytest.mark.parametrize("claim", GATES)
@pytest.mark.parametrize(
    ("numbers", "is_open"),
    [
        ((0.5, 0.1, 0.9), True), ((-0.5, -0.9, -0.1), True), ((0.49, 0.4, 0.6), False), ((3.0, -0.1, 6.0), False),
        ((-3.0, -6.0, 0.0), False), ((3.0, -math.inf, math.inf), False), ((3.0, math.nan, math.nan), False),
        ((math.nan, 1.0, 2.0), False),
    ],
)  # fmt: skip
def test_the_gate_asks_for_an_effect(claim: str, numbers: Number, is_open: bool) -> None:
    made = judge(claim, row("gate", f"TE {GATES[claim]}", numbers))
    assert made.verdict == ("supported" if is_open else "inconclusive")
    assert is_open or "nothing to mediate (gate: |TE| >= 0.5)" in made.reason
    assert is_open or made.quantity == f"TE {GATES[claim]}"


def test_without_the_treatment_nothing_is_testable() -> None:
    without = row("gate", "TE T2", None) | row("gate", "TE T2-T2b", None)
    for claim in ("C1", "C2"):
        made = judge(claim, without)
        assert made.verdict == "not testable"
        assert "no pairs with a jailbreak wrapper (T2): supply some" in made.reason
    made = judge("C3", row("gate", "TE T1", None))
    assert made.verdict == "not testable"
    assert "no harmless/harmful pairs (T1): supply some" in made.reason


@pytest.mark.parametrize("claim", ["C1", "C2"])
def test_without_twins_t2_alone_is_judged_and_the_verdict_says_so(claim: str) -> None:
    made = judge(claim, row("gate", "TE T2-T2b", None))
    assert made.verdict == "supported"
    assert "no harmless twin" in made.tags
    weak = judge(claim, row("gate", "TE T2-T2b", None) | row("gate", "TE T2", (0.1, 0.0, 0.2)))
    assert "TE of T2 is" in weak.reason
    assert judge("C3", row("gate", "TE T2-T2b", None)).tags == ()


@pytest.mark.parametrize("claim", ["C1", "C2"])
@pytest.mark.parametrize("variant", ["full response", "sufficiency", "necessity"])
def test_robust_asks_for_y2_and_each_direction(claim: str, variant: str) -> None:
    quantity = {"C1": "late share", "C2": NIE}[claim]
    for numbers in (None, (0.45, 0.3, 0.6)):
        made = judge(claim, row(claim, quantity, numbers, variant))
        assert made.verdict == "supported"
        assert "robust" not in made.tags


def test_late_by_architecture_is_tagged() -> None:
    tagged = [judge("C1", row("gate", "earliest possible depth", (at, at, at))).tags for at in (0.33, 0.34, 0.9)]
    assert [("architecture-imposed" in tags) for tags in tagged] == [False, True, True]
    assert "architecture-imposed" not in judge("C1", row("gate", "earliest possible depth", None)).tags


# ---- the ledger ----


def test_the_ledger_covers_every_claim_once_and_no_twin() -> None:
    evidence = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE, "a"), table(FINE, "b")], ignore_index=True)
    made = ledger.ledger(evidence, runs=("b",))
    assert [one.model for one in made] == ["b"] * 9 + ["a"] * 3
    assert [one.claim for one in made[:9]] == list(claims.STATEMENTS)
    for one in made[3:9]:
        assert one.verdict == "not testable"
        assert one.reason.startswith("needs the ")
    assert {one.verdict for one in made} <= {"supported", "contradicted", "inconclusive", "not testable"}


def test_a_twin_belongs_to_its_own_model() -> None:
    evidence = pd.concat([table(TWIN, "a" + UNTRAINED), table(FINE, "a"), table(FINE, "b")], ignore_index=True)
    made = {one.model: one for one in ledger.ledger(evidence) if one.claim == "C1"}
    assert made["a"].verdict == "supported"
    assert made["b"].controls["untrained twin"] == "not run"


def test_evidence_survives_its_file(tmp_path: Path) -> None:
    own = table(FINE | row("gate", "TE T1", (1.0, -math.inf, math.inf)), "m")
    evidence = pd.concat([own, table(TWIN, "m" + UNTRAINED)], ignore_index=True)
    path = store.write_table(evidence, tmp_path / "02_evidence.csv")
    assert ledger.ledger(store.read_table(path, store.EVIDENCE)) == ledger.ledger(evidence)


def test_records_are_json(tmp_path: Path) -> None:
    own = table(
        FINE | row("gate", "TE T1", (1.0, -math.inf, math.inf)) | row("gate", "TE T2-T2b", (math.nan,) * 3), "m"
    )
    made = ledger.ledger(own, runs=("m",))
    saved = store.read_json(store.write_json(ledger.records(made), tmp_path / "claims.json"))
    assert [one["verdict"] for one in saved] == [one.verdict for one in made]
    by_claim = {one["claim"]: one for one in saved}
    assert by_claim["C3"]["ci_low"] is None
    assert by_claim["C3"]["estimate"] == 1.0
    assert by_claim["C1"]["estimate"] is None


def test_tables_of_the_ledger() -> None:
    made = ledger.ledger(pd.concat([table(FINE), table(TWIN, "m" + UNTRAINED)], ignore_index=True), runs=("m",))
    frame = ledger.table(made)
    assert frame.loc[frame.claim == "C1", ["verdict", "estimate", "tags"]].values.tolist() == [
        ["supported", 0.7, "robust"]
    ]
    assert frame.columns[-1] == "reason"
    lines = ledger.markdown(made).splitlines()
    assert len(lines) == 2 + 9
    assert lines[2].startswith("| m | C1 | supported | 0.70 [0.60, 0.80] | robust |")
    assert all(line.count("|") == 7 for line in lines)


def test_a_reason_does_not_break_the_markdown_table() -> None:
    made = ledger.ledger(table(FINE | row("gate", "TE T1", (0.1, 0.0, 0.2))))
    line = ledger.markdown(made).splitlines()[4]
    assert "(gate: \\|TE\\| >= 0.5) |" in line
    assert line.replace("\\|", "").count("|") == 7


def run(results: Path, name: str, model: str, estimate: float) -> None:
    numbers = {("gate", "TE T2", "main"): (estimate, 0.0, 1.0)}
    (results / name).mkdir()
    evidence = pd.concat([table(numbers, model), table(numbers, model + UNTRAINED), table(numbers, "window-1")])
    store.write_table(evidence, results / name / "02_evidence.csv")


def test_runs_are_collected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run with evidence"):
        ledger.collect(tmp_path)
    run(tmp_path, "embedded", "embedded", 1.0)
    run(tmp_path, "other", "other", 2.0)
    run(tmp_path, "window-1", "window-1", 3.0)
    store.write_table(table(row("C2", NIE, (0.5, 0.4, 0.6)), "other"), tmp_path / "other" / "03_evidence.csv")
    (tmp_path / "empty").mkdir()
    evidence, runs = ledger.collect(tmp_path)
    assert runs == ("embedded", "other", "window-1")
    found = evidence.set_index(["model", "quantity"]).estimate.to_dict()
    assert found == {
        ("embedded", "TE T2"): 1.0, ("embedded" + UNTRAINED, "TE T2"): 1.0, ("other", "TE T2"): 2.0, ("other", NIE): 0.5,
        ("other" + UNTRAINED, "TE T2"): 2.0, ("window-1", "TE T2"): 3.0, ("window-1" + UNTRAINED, "TE T2"): 3.0,
    }  # fmt: skip


def test_a_missing_row_is_none() -> None:
    rows = Rows("m", table(FINE))
    assert rows.find("C1", "late share", "full response").estimate == 0.7
    assert rows.find("C1", "late share", "nothing") is None
    assert controls.same_side(rows, "C1", "late share", "nothing", 0.5) == "not run"
    assert np.isfinite(rows.table.estimate).all()
