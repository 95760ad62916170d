"""Rows of evidence that support every claim, to be changed one at a time."""

import pandas as pd

from companion.base import files
from companion.base.thresholds import KEPT_BY_FIRST_TOKEN, MLP_SHARE, UNTRAINED
from companion.claims import registered_rules
from companion.claims.verdict import Rows, Verdict

Number = tuple[float, float, float]
FINE: dict[tuple[str, str, str], Number] = {  # C1 to C3, and what every claim asks for
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
LATER: dict[tuple[str, str, str], Number] = {  # C4 to C7
    **{("C4", MLP_SHARE, variant): (0.8, 0.7, 0.9) for variant in ("main", "norm frozen", "unsaturated")},
    ("C4", "hand-over layer", "main"): (3, 3, 4),
    ("C5a", "psi1", "main"): (0.5, 0.4, 0.6),
    ("C5a", "psi1", "norm frozen"): (0.5, 0.4, 0.6),
    ("C5a", "psi1", "unsaturated"): (0.4, 0.2, 0.6),
    ("C5a", "k90", "main"): (5.0, 4.0, 7.0),
    ("C5a", "k90", "random order"): (900.0, 880.0, 920.0),
    ("C5a", "neurons in the layer", "main"): (1000.0, 1000.0, 1000.0),
    **{("C5a", f"k90 B{i}", "main"): (10.0 * i, 9.0, 70.0) for i in range(1, 6)},
    ("C5b", "gate index", "main"): (0.8, 0.7, 0.9),
    ("C5b", "gate index", "norm frozen"): (0.7, 0.6, 0.8),
    ("C5b", "gate index, signed", "main"): (0.8, 0.7, 0.9),
    ("C5b", "gate index, form", "a: last"): (0.0, 0.0, 0.0),
    ("C5b", "gate index, form", "b: inside"): (0.1, 0.0, 0.15),
    ("C5b", "gate index, form", "c: below"): (0.8, 0.7, 0.9),
    ("C5b", "readout share", "main"): (0.2, 0.1, 0.3),
    ("C5b", "benign share", "main"): (0.1, 0.05, 0.15),
    ("C5b", "perplexity ratio", "main"): (1.0, 0.99, 1.005),
    ("C5c", KEPT_BY_FIRST_TOKEN, "main"): (0.95, 0.85, 1.0),
    ("C5c", KEPT_BY_FIRST_TOKEN, "full response"): (0.9, 0.8, 1.0),
    ("C5c", "effect of all tokens", "main"): (0.8, 0.7, 0.9),
    ("C5c", "benign answers changed", "main"): (0.05, 0.0, 0.15),
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
    ("C7", "Moran's I", "main"): (0.2, 0.15, 0.25),
    ("C7", "best window - best random group", "main"): (0.2, 0.1, 0.3),
    ("C7", "best window, permutation p", "main"): (0.05, 0.05, 0.05),
}
TWIN: dict[tuple[str, str, str], Number] = {
    ("gate", "TE T2-T2b", "main"): (0.0, -0.1, 0.1),
    ("C1", "late share", "main"): (0.6, 0.55, 0.65),
    ("C1", "centroid difference", "main"): (0.0, -0.1, 0.1),
}
NIE, DIRECT, PSI = "MLP share of NIE", "MLP share of direct effects", "psi0 early, shared tokens"


def table(numbers: dict, model: str = "m", n_topics: int = 36, n_harmless: int = 400) -> pd.DataFrame:
    """Evidence rows by claim, quantity and variant; None leaves one out."""
    rows = [(model, *key, *values, 2 * n_topics, n_topics, "") for key, values in numbers.items() if values is not None]
    made = pd.DataFrame(rows, columns=list(files.EVIDENCE))
    made.loc[made.quantity == "harmless loss", "n_pairs"] = n_harmless
    return made


def judge(claim: str, changes: dict | None = None, twin: dict | None = None, **counts: int) -> Verdict:
    """The registered rule's verdict on fine evidence with some rows changed, or taken away by None."""
    own = Rows("m", table({**FINE, **LATER, **(changes or {})}, **counts))
    rule = getattr(registered_rules, f"rule_{claim.lower()}")
    made = rule(own, Rows("m" + UNTRAINED, table({**TWIN, **(twin or {})}))) if claim == "C1" else rule(own)
    assert made.model == "m" and made.claim == claim
    return made


def row(claim: str, quantity: str, numbers: Number | None, *variants: str) -> dict:
    """The same numbers for some variants of a quantity, the main one if none is named."""
    return {(claim, quantity, variant): numbers for variant in variants or ("main",)}
