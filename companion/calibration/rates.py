"""Error rates of the method's own verdicts, from models whose truth is known.

A row a draw, claim and rule (`MEASURED`): `rule` is the registered one or its correction (`claims_corrected`), `truth` what
was built, `verdict` what the rule said at the draw's sample size. `population_verdict` is what it says on a sample so large
that its error is negligible (`AT_LARGE`). So a wrong verdict has two possible causes: the sample (verdict against population
verdict), or the rule itself (population verdict against truth).

What the calibration says of a claim's rule, for the ledger: its error rates on models whose truth is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from statsmodels.stats.proportion import proportion_confint

from companion.base import files, paths
from companion.claims.ledger import CORRECTED, Rates

NUMBERS = ("estimate", "ci_low", "ci_high", "population")
MEASURED = {
    **dict.fromkeys(("kind", "claim", "rule", "truth", "verdict", "gate", "quantity", "reason", "code"), "str"),
    **dict.fromkeys(("seed", "topics", "pairs"), "int"),
    **dict.fromkeys(("effect", *NUMBERS[:3]), "float"),
}
STORED = {**MEASURED, "purpose": "str"}  # as shipped: with what a draw was made for
AT_LARGE = {
    **dict.fromkeys(("kind", "claim", "rule", "population_verdict", "code"), "str"), "seed": "int", "population": "float",
}  # fmt: skip
COUNTED = ("hits", "n", "estimate", "low", "high")  # a rate with its exact 95 % interval
TRUTHS = ("true", "false", "open")
OUTCOMES = ("supported", "contradicted", "inconclusive", "not testable")
ENOUGH_NULLS = 59  # with no error among 59 draws, the exact 95 % bound on the error rate is below 5 %
ROUNDING = 1e-3  # the model's norms and float32 move a share by about 1e-4 from the closed form's value


def rate(hits: int, n: int) -> tuple[float, float, float]:
    """Share with its exact (Clopper-Pearson) 95 % interval; NaN and the whole range where nothing was drawn.

    >>> [round(x, 3) for x in rate(0, 59)]
    [0.0, 0.0, 0.061]
    """
    if n == 0:
        return float("nan"), 0.0, 1.0
    low, high = proportion_confint(hits, n, alpha=0.05, method="beta")
    return hits / n, float(low), float(high)


def upper_bound(hits: int, n: int) -> float:
    """Exact one-sided 95 % upper bound on a rate.

    >>> round(upper_bound(0, 59), 4)
    0.0495
    """
    return float(proportion_confint(hits, n, alpha=0.10, method="beta")[1]) if n else 1.0


def lower_bound(hits: int, n: int) -> float:
    """Exact one-sided 95 % lower bound on a rate.

    >>> round(lower_bound(6, 60), 4)
    0.0445
    """
    return float(proportion_confint(hits, n, alpha=0.10, method="beta")[0]) if n else 0.0


def given(table: pd.DataFrame) -> pd.DataFrame:
    """The draws in which a rule was asked and had something to read: past the gate, and testable."""
    return table[(table.gate == "passed") & (table.verdict != "not testable")]


def confusion(table: pd.DataFrame, *, given_gate: bool = False) -> pd.DataFrame:
    """Counts of verdicts by claim and truth: `hits` of `n`, exact intervals; on request only of the draws that are `given`."""
    chosen = given(table) if given_gate else table
    index = pd.MultiIndex.from_product(
        [sorted(table.claim.unique()), TRUTHS, OUTCOMES], names=["claim", "truth", "verdict"]
    )
    counts = chosen.groupby(["claim", "truth", "verdict"]).size().reindex(index, fill_value=0)
    made = pd.DataFrame({"hits": counts, "n": counts.groupby(["claim", "truth"]).transform("sum")}).reset_index()
    made[["estimate", "low", "high"]] = [rate(row.hits, row.n) for row in made.itertuples()]
    return made


def errors(table: pd.DataFrame, *, given_gate: bool = False) -> pd.DataFrame:
    """Per claim: how often "supported" is said of a false claim and "contradicted" of a true one, and the power of both.

    Columns `error` (false supported, false contradicted, power to support, power to contradict), `hits`, `n`,
    `estimate`, `low`, `high` (exact), and `lower` and `upper`, the one-sided 95 % bounds. On request only of the draws that are
    `given`.
    """
    chosen = given(table) if given_gate else table
    asked = (
        ("false supported", "false", "supported"),
        ("false contradicted", "true", "contradicted"),
        ("power to support", "true", "supported"),
        ("power to contradict", "false", "contradicted"),
    )
    rows = []
    for claim in sorted(table.claim.unique()):
        for name, truth, verdict in asked:
            part = chosen[(chosen.claim == claim) & (chosen.truth == truth)]
            hits = int((part.verdict == verdict).sum())
            n = len(part)
            rows.append((claim, name, hits, n, *rate(hits, n), lower_bound(hits, n), upper_bound(hits, n)))
    return pd.DataFrame(rows, columns=["claim", "error", *COUNTED, "lower", "upper"])


def supported_by_kind(table: pd.DataFrame, truth: str) -> pd.DataFrame:
    """How often "supported" is said of a claim that is false (or true) in a given way: one row a claim and kind of model.

    Of false claims this is the severity of a rule, of true ones its power. `upper` is the one-sided exact 95 % bound.
    """
    rows = []
    for (claim, kind), part in table[table.truth == truth].groupby(["claim", "kind"]):
        hits = int((part.verdict == "supported").sum())
        rows.append((claim, kind, hits, len(part), *rate(hits, len(part)), upper_bound(hits, len(part))))
    return pd.DataFrame(rows, columns=["claim", "kind", *COUNTED, "upper"])


def split_errors(table: pd.DataFrame) -> pd.DataFrame:
    """Sampling error (verdict differs from the population verdict) and construct error (the population verdict is wrong).

    Only draws with a population verdict count. A construct error is "supported" of a false or "contradicted" of a true
    claim: "inconclusive" is no error, but no help either, and is counted as `silent`.
    """
    known = table[(table.population_verdict != "") & (table.truth != "open")]
    wrong = {"true": "contradicted", "false": "supported"}
    rows = []
    for claim, part in known.groupby("claim"):
        construct = part.population_verdict == part.truth.map(wrong)
        silent = ~part.population_verdict.isin(["supported", "contradicted"])
        differs = part.verdict != part.population_verdict
        for name, hit in (("sampling", differs), ("construct", construct), ("silent", silent)):
            rows.append((claim, name, int(hit.sum()), len(part), *rate(int(hit.sum()), len(part))))
    return pd.DataFrame(rows, columns=["claim", "error", *COUNTED])


def coverage(table: pd.DataFrame) -> pd.DataFrame:
    """Share of intervals that hold the population value up to `ROUNDING`, by claim and quantity; both ends finite."""
    known = table[np.isfinite(table[list(NUMBERS)]).all(axis=1)]
    rows = []
    for (claim, quantity), part in known.groupby(["claim", "quantity"]):
        above, below = part.population - part.ci_low, part.ci_high - part.population
        hits = int((np.minimum(above, below) >= -ROUNDING).sum())
        rows.append((claim, quantity, hits, len(part), *rate(hits, len(part))))
    return pd.DataFrame(rows, columns=["claim", "quantity", *COUNTED])


def power(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Share of right verdicts (supported if true, contradicted if false) by claim, truth and a column (`topics`, `effect`)."""
    right = {"true": "supported", "false": "contradicted"}
    rows = []
    for (claim, truth, value), part in table[table.truth.isin(right)].groupby(["claim", "truth", by]):
        hits = int((part.verdict == right[truth]).sum())
        rows.append((claim, truth, value, hits, len(part), *rate(hits, len(part))))
    return pd.DataFrame(rows, columns=["claim", "truth", by, *COUNTED])


def roc(truth: Mapping[object, bool], scores: Mapping[str, Mapping[object, float]]) -> pd.DataFrame:
    """Receiver operating curves: for each score the shares of false and of true cases above every threshold, and the area.

    `auroc` has a 95 % interval, `auroc_low` to `auroc_high`: true and false cases redrawn, each among themselves (it has no
    width where the scores do not overlap). A case without a score counts as 0, since a test that found nothing to measure
    called nothing.

    >>> float(roc({"a": True, "b": False}, {"index": {"a": 0.9, "b": 0.1}}).auroc.iloc[0])
    1.0
    """
    member = np.array(list(truth.values()), dtype=bool)
    tables = []
    for name, known in scores.items():
        values = np.array([known.get(case, 0.0) for case in truth])
        false, true, _ = roc_curve(member, values)
        low, high = _area_interval(values[member], values[~member])
        area = {"auroc": float(roc_auc_score(member, values)), "auroc_low": low, "auroc_high": high}
        tables.append(pd.DataFrame({"score": name, "false_rate": false, "true_rate": true, **area}))
    return pd.concat(tables, ignore_index=True)


def _area_interval(true: np.ndarray, false: np.ndarray) -> tuple[float, float]:
    """The area is the share of (true, false) couples that are ranked rightly, so redrawing cases only weights the couples."""
    right = (true[:, None] > false) + 0.5 * (true[:, None] == false)
    rng = np.random.default_rng(0)
    n_true, n_false = right.shape
    times = [rng.multinomial(n, np.full(n, 1 / n), size=2000) for n in (n_true, n_false)]
    low, high = np.quantile(((times[0] @ right) * times[1]).sum(1) / right.size, [0.025, 0.975])
    return float(low), float(high)


def ranking_quality(is_part: Sequence[bool], score: Sequence[float]) -> dict[str, float]:
    """How well scores find the members of a set: AUROC, average precision and precision at the size of the set.

    NaN where all or none are members.

    >>> ranking_quality([True, False, True, False], [3.0, 0.0, 2.0, 1.0])
    {'auroc': 1.0, 'average precision': 1.0, 'P@k': 1.0}
    """
    member, values = np.asarray(is_part, dtype=bool), np.asarray(score, dtype=float)
    if member.all() or not member.any():
        return dict.fromkeys(("auroc", "average precision", "P@k"), float("nan"))
    k = int(member.sum())
    top = np.argsort(-values, kind="stable")[:k]
    return {
        "auroc": float(roc_auc_score(member, values)),
        "average precision": float(average_precision_score(member, values)),
        "P@k": float(member[top].mean()),
    }


# The first seeds of models that were planned after the corrections of C1 and C6, and after that of C4.
FRESH_LATER, FRESH_LAST = 200, 300
JUDGED_FROM = {"C1": FRESH_LATER, "C6": FRESH_LATER, "C4": FRESH_LAST}  # the corrected rule, that is
# Planned before the corrections of C1 and C6, but measured only afterwards.
UNSEEN = [(kind, seed) for kind in ("early_carrier", "late_like_benign") for seed in (15, 20, 25)]


def main_draws(folder: Path = paths.CALIBRATION) -> pd.DataFrame:
    """Verdicts of the draws that rates are computed from; a claim judged by its corrected rule has a name of its own.

    >>> sorted({name for name in main_draws().claim if name.startswith("C2")})
    ['C2', 'C2*']
    """
    return _draws(("main",), folder)


def power_draws(folder: Path = paths.CALIBRATION) -> pd.DataFrame:
    """Verdicts, named as in `main_draws`, of the models that were measured with several effects, topics and pairs a topic.

    Every model is there with each of them, so what differs along a curve is that number alone.
    """
    table = _draws(("effect", "topics", "pairs"), folder)
    return table.assign(effect=table.effect.round(3))


def _draws(purposes: Sequence[str], folder: Path) -> pd.DataFrame:
    table = files.read_table(folder / "verdicts.parquet", STORED)
    table = table[table.purpose.isin(purposes) & ~_seen(table)]
    if "main" in purposes:
        known = population_verdicts(folder).drop(columns="code")
        table = table.merge(known, how="left", on=["kind", "seed", "claim", "rule"], validate="one_to_one")
        table["population_verdict"] = table.population_verdict.fillna("")
    return table.assign(claim=table.claim + (table.rule == "corrected").map({True: CORRECTED, False: ""}))


def population_verdicts(folder: Path = paths.CALIBRATION) -> pd.DataFrame:
    """Population verdicts (`rates.AT_LARGE`); empty where none are shipped."""
    path = folder / "population.parquet"
    if path.is_file():
        return files.read_table(path, AT_LARGE)
    return pd.DataFrame(columns=list(AT_LARGE)).astype({"seed": "int64", "population": "float64"})


def _seen(table: pd.DataFrame) -> pd.Series:
    """Rows of the youngest corrections on draws that had been looked at when they were written: they would flatter them.

    The shipped table has none; one that is measured anew from the first draw on has them.
    """
    known = pd.Series(list(zip(table.kind, table.seed, strict=True)), table.index)
    late = (table.rule == "corrected") & table.claim.isin(list(JUDGED_FROM)) & (table.purpose == "main")
    return late & (table.seed < table.claim.map(JUDGED_FROM)) & ~((table.claim == "C1") & known.isin(UNSEEN))


def by_claim(folder: Path = paths.CALIBRATION) -> Rates:
    """For each claim (a corrected rule: "C2*") and error: `hits` of `n` draws, `rate`, and `upper`, the exact 95 % bound.

    The errors are those of `rates.errors`. Empty where no draws are shipped.
    """
    if not (folder / "verdicts.parquet").is_file():
        return {}
    found: dict[str, dict[str, dict[str, object]]] = {}
    for row in errors(main_draws(folder), given_gate=True).itertuples():
        if row.n:
            rate = {
                "hits": int(row.hits),
                "n": int(row.n),
                "rate": round(row.estimate, 4),
                "upper": round(row.upper, 4),
            }
            found.setdefault(str(row.claim), {})[str(row.error).replace(" ", "_")] = rate
    return found


def state(row: pd.Series) -> str:
    """Whether a rate of false support shows the 5 % target: its one-sided 95 % bounds against it.

    >>> state(pd.Series({"n": 20, "upper": 0.14, "lower": 0.0}))
    'not enough draws'
    """
    if row.upper <= 0.05:
        return "target shown"
    if row.lower > 0.05:
        return "target missed"
    return "not enough draws" if row.n < ENOUGH_NULLS else "target not shown"


def power_state(row: pd.Series) -> str:
    """The same of the power to support, whose target is 80 %; a rule that supports nothing cannot err by supporting.

    >>> power_state(pd.Series({"hits": 0, "lower": 0.0, "upper": 0.1}))
    'never says supported, so that its bound on false support is no evidence'
    """
    if not row.hits:
        return "never says supported, so that its bound on false support is no evidence"
    if row.lower >= 0.8:
        return "80 % shown"
    return "80 % missed" if row.upper < 0.8 else "80 % neither shown nor missed"


def plants(folder: Path = paths.CALIBRATION) -> pd.DataFrame:
    """Evidence of the plants and of their untrained twins, for the ledger; empty where none is shipped."""
    path = folder / "plant_evidence.parquet"
    if not path.is_file():
        return pd.DataFrame(columns=list(files.EVIDENCE))
    return files.read_table(path, files.EVIDENCE)
