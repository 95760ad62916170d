"""Rows of evidence that support every claim, to be changed one at a time."""

import pandas as pd

from companion.base import files
from companion.base.thresholds import UNTRAINED
from companion.claims import ledger
from companion.claims.verdict import Verdict

Number = tuple[float, float, float]
FINE: dict[tuple[str, str, str], Number] = {
    ("gate", "TE T1", "main"): (-3.0, -3.3, -2.7),
    ("gate", "TE T2", "main"): (4.0, 3.7, 4.3),
    ("gate", "TE T2-T2b", "main"): (2.0, 1.8, 2.2),
    ("gate", "joint probability T1", "main"): (0.97, 0.96, 0.98),
    ("gate", "joint probability T2", "main"): (0.95, 0.94, 0.96),
    ("gate", "earliest possible depth", "main"): (0.25, 0.2, 0.3),
    ("gate", "significand bits", "main"): (24, 24, 24),
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
    return pd.DataFrame(rows, columns=list(files.EVIDENCE))


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
