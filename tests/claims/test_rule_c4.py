"""The rule of C4 on planted evidence."""

import pytest
from ledger_rows import FINE, Number, table

from companion.claims.registered_rules import rule_c4
from companion.claims.verdict import Rows, Verdict

SHARE = "share of MLPs"
FINE_C4: dict[tuple[str, str, str], Number] = {
    **{key: FINE[key] for key in FINE if key[0] == "gate"},
    **{("C4", SHARE, name): (0.8, 0.7, 0.9) for name in ("main", "norm frozen", "unsaturated")},
    ("C4", "hand-over layer", "main"): (3, 3, 4),
}


def judged(changes: dict | None = None, n_topics: int = 36) -> Verdict:
    return rule_c4(Rows("m", table({**FINE_C4, **(changes or {})}, n_topics=n_topics)))


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [((0.8, 0.6, 0.9), "supported"), ((0.8, 0.59, 0.9), "inconclusive"), ((0.3, 0.2, 0.4), "contradicted"),
     ((0.3, 0.2, 0.41), "inconclusive")],
)  # fmt: skip
def test_c4_thresholds(numbers: Number, verdict: str) -> None:
    low = {("C4", SHARE, name): numbers for name in ("norm frozen", "unsaturated")}
    assert judged({("C4", SHARE, "main"): numbers, **low}).verdict == verdict


@pytest.mark.parametrize("variant", ["norm frozen", "unsaturated"])
@pytest.mark.parametrize(("numbers", "state"), [((0.4, 0.3, 0.5), "failed"), (None, "not run")])
def test_c4_controls_cap(variant: str, numbers: Number | None, state: str) -> None:
    made = judged({("C4", SHARE, variant): numbers})
    assert made.verdict == "inconclusive" and state in (made.controls or {}).values()


def test_c4_without_its_evidence() -> None:
    assert judged(dict.fromkeys([key for key in FINE_C4 if key[0] == "C4"])).verdict == "not testable"
    assert judged({("gate", "TE T2-T2b", "main"): (0.2, 0.1, 0.3)}).verdict == "inconclusive"
    assert judged(n_topics=12).verdict == "inconclusive"
    assert judged({("gate", "joint probability T2", "main"): (0.5, 0.4, 0.6)}).verdict == "inconclusive"
