"""The ledger's rules: every verdict of C1, C2 and C3, and every control that caps it."""

import math

import pytest
from ledger_rows import DIRECT, FINE, NIE, PSI, Number, judge, row

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
    assert "no normalisation moves either across one half" in made.reason


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
