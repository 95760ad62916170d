"""What the calibration says of a claim's rule, for the ledger: its error rates on models whose truth is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from helpers import calibration_stats, paths, store
from helpers.calibration_stats import AT_LARGE, ENOUGH_NULLS, STORED

Rates = Mapping[str, Mapping[str, Mapping[str, object]]]
# The first seeds of models that were planned after the corrections of C1 and C6, and after that of C4.
FRESH_LATER, FRESH_LAST = 200, 300
JUDGED_FROM = {"C1": FRESH_LATER, "C6": FRESH_LATER, "C4": FRESH_LAST}  # the corrected rule, that is
# Planned before the corrections of C1 and C6, but measured only afterwards.
UNSEEN = [(kind, seed) for kind in ("early_carrier", "late_like_benign") for seed in (15, 20, 25)]
CORRECTED = "*"  # behind a claim's name: its corrected rule


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
    table = store.read_table(folder / "verdicts.parquet", STORED)
    table = table[table.purpose.isin(purposes) & ~_seen(table)]
    if "main" in purposes:
        known = at_large(folder).drop(columns="code")
        table = table.merge(known, how="left", on=["kind", "seed", "claim", "rule"], validate="one_to_one")
        table["population_verdict"] = table.population_verdict.fillna("")
    return table.assign(claim=table.claim + (table.rule == "corrected").map({True: CORRECTED, False: ""}))


def at_large(folder: Path = paths.CALIBRATION) -> pd.DataFrame:
    """Population verdicts (`calibration_stats.AT_LARGE`); empty where none are shipped."""
    path = folder / "population.parquet"
    if path.is_file():
        return store.read_table(path, AT_LARGE)
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

    The errors are those of `calibration_stats.errors`. Empty where no draws are shipped.
    """
    if not (folder / "verdicts.parquet").is_file():
        return {}
    found: dict[str, dict[str, dict[str, object]]] = {}
    for row in calibration_stats.errors(main_draws(folder), given_gate=True).itertuples():
        if row.n:
            rate = {
                "hits": int(row.hits),
                "n": int(row.n),
                "rate": round(row.estimate, 4),
                "upper": round(row.upper, 4),
            }
            found.setdefault(str(row.claim), {})[str(row.error).replace(" ", "_")] = rate
    return found


def beside(claim: str, verdict: str, rates: Rates) -> str:
    """The rate that a reader of this verdict must know, as a phrase; "" where nothing was measured.

    Beside "supported": how often it is said of a false claim. Beside "contradicted": of a true one. Beside "inconclusive": how
    often a true claim is left so or worse.

    >>> rates = {"C2": {"false_supported": {"hits": 0, "n": 60, "rate": 0.0, "upper": 0.0487}}}
    >>> beside("C2", "supported", rates)
    'said of 0 of 60 false claims (at most 5 %)'
    """
    own = rates.get(claim, {})
    words = {
        "supported": ("false_supported", "said of {hits} of {n} false claims (at most {upper:.0%})"),
        "contradicted": ("false_contradicted", "said of {hits} of {n} true claims (at most {upper:.0%})"),
        "inconclusive": ("power_to_support", "true claims supported: {hits} of {n}"),
    }
    error, phrase = words.get(verdict, ("", ""))
    return phrase.format(**own[error]).replace("%", " %") if error in own else ""


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
        return pd.DataFrame(columns=list(store.EVIDENCE))
    return store.read_table(path, store.EVIDENCE)
