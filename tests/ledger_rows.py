"""Rows of evidence that support every claim, to be changed one at a time."""

import pandas as pd

from companion.base import files
from companion.base.thresholds import KEPT_BY_FIRST_TOKEN, MLP_SHARE, UNTRAINED
from companion.claims import registered_rules
from companion.claims.verdict import Rows, Verdict

REGISTERED = ("C1", "C2", "C3", "C4", "C5a", "C5b", "C5c", "C6", "C7")  # claims that have a registered rule
Number = tuple[float, float, float]
Numbers = dict[tuple[str, str, str], Number | None]
NIE, DIRECT, PSI = "MLP share of NIE", "MLP share of direct effects", "psi0 early, shared tokens"
ROBUST = ("main", "sufficiency", "necessity", "full response", "norm frozen", "unsaturated")
SIZES = ("per patch norm", "per parameter")


def row(claim: str, quantity: str, numbers: Number | None, *variants: str) -> Numbers:
    """The same numbers for some variants of a quantity, the main one if none is named."""
    return {(claim, quantity, variant): numbers for variant in variants or ("main",)}


def main(claim: str, numbers: dict[str, Number]) -> Numbers:
    return {(claim, quantity, "main"): found for quantity, found in numbers.items()}


FINE: Numbers = {  # C1 to C3, and what every claim asks for
    **main("gate", {"TE T1": (-3.0, -3.3, -2.7), "TE T2": (4.0, 3.7, 4.3), "TE T2-T2b": (2.0, 1.8, 2.2)}),
    **main("gate", {"joint probability T1": (0.97, 0.96, 0.98), "joint probability T2": (0.95, 0.94, 0.96)}),
    **main("gate", {"earliest possible depth": (0.25, 0.2, 0.3), "significand bits": (24, 24, 24)}),
    **row("C1", "late share", (0.7, 0.6, 0.8), *ROBUST),
    **main("C1", {"centroid difference": (0.2, 0.1, 0.3)} | {f"centroid B{i}": (0.5, 0.4, 0.6) for i in range(1, 6)}),
    **main("C1", {"centroid T2-T2b": (0.7, 0.65, 0.75)}),
    **row("C2", NIE, (0.8, 0.7, 0.9), *ROBUST, *SIZES), **row("C2", DIRECT, (0.85, 0.75, 0.95), "main", *SIZES),
    **row("C3", PSI, (0.6, 0.5, 0.7)), **row("C3", PSI, (0.5, 0.4, 0.6), "unsaturated"),
    **main("C3", {"AUROC probe": (0.9, 0.85, 0.95), "AUROC bag of tokens": (0.7, 0.6, 0.8), "AUROC gain": (0.2, 0.1, 0.3)}),
}  # fmt: skip
LATER: Numbers = {  # C4 to C7
    **row("C4", MLP_SHARE, (0.8, 0.7, 0.9), "main", "norm frozen", "unsaturated"), **main("C4", {"hand-over layer": (3, 3, 4)}),
    **row("C5a", "psi1", (0.5, 0.4, 0.6), "main", "norm frozen"), **row("C5a", "psi1", (0.4, 0.2, 0.6), "unsaturated"),
    **main("C5a", {"k90": (5.0, 4.0, 7.0), "neurons in the layer": (1000.0, 1000.0, 1000.0)}),
    **row("C5a", "k90", (900.0, 880.0, 920.0), "random order"),
    **main("C5a", {f"k90 B{i}": (10.0 * i, 9.0, 70.0) for i in range(1, 6)}),
    **main("C5b", {"gate index": (0.8, 0.7, 0.9), "gate index, signed": (0.8, 0.7, 0.9), "readout share": (0.2, 0.1, 0.3)}),
    **row("C5b", "gate index", (0.7, 0.6, 0.8), "norm frozen"), **row("C5b", "gate index, form", (0.0, 0.0, 0.0), "a: last"),
    **row("C5b", "gate index, form", (0.1, 0.0, 0.15), "b: inside"),
    **row("C5b", "gate index, form", (0.8, 0.7, 0.9), "c: below"),
    **main("C5b", {"benign share": (0.1, 0.05, 0.15), "perplexity ratio": (1.0, 0.99, 1.005)}),
    **main("C5c", {KEPT_BY_FIRST_TOKEN: (0.95, 0.85, 1.0)}),
    **row("C5c", KEPT_BY_FIRST_TOKEN, (0.9, 0.8, 1.0), "full response"),
    **main("C5c", {"effect of all tokens": (0.8, 0.7, 0.9), "benign answers changed": (0.05, 0.0, 0.15)}),
    **main("C6", {"harm change": (-60.0, -66.0, -54.0), "phi": (0.95, 0.90, 1.0), "harmless loss": (0.3, -0.5, 1.1)}),
    **row("C6", "harm change", (-62.0, -68.0, -56.0), "greedy"),
    **main("C6", {"over-refusal": (0.4, -0.4, 1.2), "KL": (0.005, 0.004, 0.006), "spread over refits": (1.0, 0.5, 2.0)}),
    **main("C6", {"perplexity ratio": (1.002, 1.001, 1.003)}),
    **main("C6", {f"advantage over {rival}": (40.0, 33.0, 47.0) for rival in ("early", "mid")}),
    **main("C6", {f"budget of {rival} over late": (1.01, 1.01, 1.01) for rival in ("early", "mid")}),
    **main("C6", {f"p {family}": (1 / 101,) * 3 for family in ("isotropic", "covariance-matched")}),
    **main("C7", {"Moran's I": (0.2, 0.15, 0.25), "best window - best random group": (0.2, 0.1, 0.3)}),
    **main("C7", {"best window, permutation p": (0.05, 0.05, 0.05)}),
}  # fmt: skip
TWIN: Numbers = {
    **main("gate", {"TE T2-T2b": (0.0, -0.1, 0.1)}),
    **main("C1", {"late share": (0.6, 0.55, 0.65), "centroid difference": (0.0, -0.1, 0.1)}),
}


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
