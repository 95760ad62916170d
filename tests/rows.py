"""Tables with known answers: effects, evidence that supports every claim, and rows of public sets."""

from collections.abc import Callable, Mapping
from itertools import product

import numpy as np
import pandas as pd

from companion.base import files
from companion.base.thresholds import COMPONENTS, KEPT_BY_FIRST_TOKEN, MLP_SHARE, UNTRAINED
from companion.claims import registered_rules
from companion.claims.verdict import Rows, Verdict, precondition
from companion.mediation.estimands import with_estimands

# ---- effects ----

N_LAYERS = 6
LATE_MLP = {("mlp_out", 5): 3.0, ("attn_out", 4): 1.0, ("mlp_out", 0): 0.6, ("attn_out", 1): 0.4}


def effect_table(
    cells: Mapping[tuple[str, int], float | tuple[float, float]] = LATE_MLP, *, treatment: str = "T2", outcome: str = "Y1",
    te: float = 4.0, start: float = -2.0, spread: float = 0.3, noise: float = 0.0, seed: int = 0, topics: str = "topic",
) -> pd.DataFrame:  # fmt: skip
    """One row a pair and cell of all sites and layers, two pairs of each of 50 topics; a cell not named has no effect.

    `cells` maps (site, layer) to NIE0 = NIE1 or to the two. All effects of a topic are multiplied by one number around 1
    (`spread`), so that shares are the same in every topic; `noise` is added to every effect on its own.
    """
    rng, rows = np.random.default_rng(seed), []
    name = treatment.removesuffix("-T2b")  # a difference belongs to its T2 pair
    for topic, k in product(range(50), range(2)):
        split = "discover" if topic < 20 else "validate" if topic < 35 else "test"
        scale = 1 + spread * rng.uniform(-1, 1)
        for site, layer in product(COMPONENTS, range(N_LAYERS)):
            nie = np.broadcast_to(cells.get((site, layer), 0.0), 2) * scale + noise * rng.standard_normal(2)
            y11 = start + te * scale
            y = (start, start + nie[0], y11 - nie[1], y11)
            rows.append((f"{name}-{topic}.{k}", f"{topics} {topic}", split, site, layer, *y))
    table = pd.DataFrame(rows, columns=["pair_id", "topic", "split", "site", "layer", "y00", "y01", "y10", "y11"])
    return with_estimands(table.assign(treatment=treatment, outcome=outcome, head=-1, position="last"))


def direct_table(cells: Mapping[tuple[str, int], float] = LATE_MLP, treatment: str = "T2") -> pd.DataFrame:
    """The same for the direct effects of the frozen-norm contrast."""
    table = effect_table(cells, outcome="contrast.frozen", treatment=treatment)
    return table.assign(site=table.site + ".direct")


MIDDLE = {("mlp_out", 2): 2.0, ("attn_out", 3): 2.0}


def benign_tables(n: int = 6, cells: Mapping[tuple[str, int], float] = MIDDLE, **settings: float) -> pd.DataFrame:
    """Benign behaviours B1, B2, ... on topics of their own, by default in the middle of the network."""
    named = [{"treatment": f"B{i}", "topics": "benign", "seed": i} for i in range(1, n + 1)]
    return pd.concat([effect_table(cells, **one, **settings) for one in named], ignore_index=True)


def complete(treatment: str = "T2") -> pd.DataFrame:
    """T2 (or the contrast, with T2 beside it) under all three outcomes, and six benign behaviours."""
    names, outcomes = ("T2", "T2-T2b") if treatment == "T2-T2b" else ("T2",), ("Y1", "Y1.frozen", "Y2")
    harm = [effect_table(treatment=name, outcome=out) for name in names for out in outcomes]
    return pd.concat([*harm, benign_tables()], ignore_index=True)


def find(rows: list[dict], quantity: str, variant: str = "main") -> dict:
    (found,) = [row for row in rows if row["quantity"] == quantity and row["variant"] == variant]
    return found


def shifted(table: pd.DataFrame, split: str, **changes: float) -> pd.DataFrame:
    """The table with some columns of one split multiplied."""
    made = table.copy()
    for name, factor in changes.items():
        made.loc[made.split == split, name] *= factor
    return made


def scales() -> dict[str, pd.Series]:
    """Divisors of cells: 1 for attention and a number of its own for an MLP."""
    index = pd.MultiIndex.from_product([COMPONENTS, range(N_LAYERS)], names=["site", "layer"])
    is_mlp = index.get_level_values(0) == "mlp_out"
    sizes = {"per patch norm": 2, "per parameter": 9}
    return {name: pd.Series(np.where(is_mlp, size, 1.0), index) for name, size in sizes.items()}


# ---- evidence ----

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
    own, other = table({**FINE, **LATER, **(changes or {})}, **counts), table({**TWIN, **(twin or {})}, "m" + UNTRAINED)
    rows = Rows("m", pd.concat([own, other], ignore_index=True))
    made = precondition(rows, claim) or registered_rules.RULES[claim](rows)
    assert made.model == "m" and made.claim == claim
    return made


# ---- public sets ----

Splits = dict[str, list[dict]]


def jbb(n: int = 12, **changes: str) -> Splits:
    """Row i of both splits belongs together; every third pair differs in length."""
    sides: Splits = {"harmful": [], "benign": []}
    for i in range(n):
        kinds = {"Index": i, "Target": "", "Behavior": f"b{i}", "Category": f"c{i % 4}"}
        sides["harmful"].append({"Goal": f"w20 w{30 + i}", **kinds})
        sides["benign"].append({"Goal": f"w21 w{30 + i}{'' if i % 3 else ' w4'}", **kinds})
    sides["benign"][2] |= changes
    return sides


def prompt_rows() -> Splits:
    return {"train": [{"prompt": f"w22 w{30 + i} w50", "category": "k"} for i in range(12)]}


def alpaca() -> Splits:
    rows = [{"instruction": " ".join(f"w{3 + (i + j) % 50}" for j in range(1 + i % 4)), "input": ""} for i in range(60)]
    return {"train": [*rows, {"instruction": "w3 w4 w5", "input": "more"}]}


def xstest() -> Splits:
    kinds = [("homonyms", "safe")] * 3 + [("contrast_homonyms", "unsafe")] * 2
    kinds += [("privacy_fictional", "safe"), ("real_group_nons_discr", "safe"), ("contrast_privacy", "unsafe")]
    kinds += [("contrast_discr", "unsafe")] * 2
    return {"test": [{"prompt": f"request {i}", "type": kind, "label": label} for i, (kind, label) in enumerate(kinds)]}


HUB: dict[str, Callable[[], Splits]] = {
    "JailbreakBench/JBB-Behaviors": jbb, "walledai/StrongREJECT": prompt_rows, "walledai/XSTest": xstest,
    "tatsu-lab/alpaca": alpaca,
}  # fmt: skip
