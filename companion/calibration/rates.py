"""Error rates of the method's own verdicts, from models whose truth is known.

A row of a table of draws is a draw, claim and rule: `rule` is the registered one or its correction, `truth` what was built,
`verdict` what the rule said of the sample, and `population_verdict` what it says without sampling error. A rate has a two-sided
Wilson interval; what is held against a target is an exact one-sided bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from companion.base import paths
from companion.base.thresholds import COMPUTED, KEPT_BY_FIRST_TOKEN, MLP_SHARE_WITH_OWN, PSI
from companion.calibration.campaign import read_shipped
from companion.claims.ledger import Rates, rule_name
from companion.claims.verdict import AT_LEAST
from companion.stats.clusters import rate

RIGHT = {"true": "supported", "false": "contradicted"}
ROUNDING = 1e-3  # the model's norms and float32 move a share by about 1e-4 from the closed form's value
FRESH_LATER, FRESH_LAST = 200, 300  # first seeds of models planned after the correction of C1, and of C4
# What the true value of a claim must be so that its rule may say supported, or contradicted.
ASKED = {
    "C1*": COMPUTED, "C2*": "MLP share of direct effects", "C3*": PSI, "C4*": MLP_SHARE_WITH_OWN, "C5a*": "psi1",
    "C5b*": "gate index", "C5c*": KEPT_BY_FIRST_TOKEN,
}  # fmt: skip
SUPPORTED_FROM, CONTRADICTED_TO = ({claim: AT_LEAST[name][side] for claim, name in ASKED.items()} for side in (0, 1))
BIN = 0.05  # of the true value, in `support_curve`
JUDGED_FROM = {"C1": FRESH_LATER, "C4": FRESH_LAST}  # the corrected rule, that is
# Planned before the correction of C1, but measured only afterwards.
UNSEEN = [(kind, seed) for kind in ("early_carrier", "late_like_benign") for seed in (15, 20, 25)]


def one_sided(hits: int, n: int) -> tuple[float, float]:
    """Exact one-sided 95 % lower and upper bound on a rate.

    >>> [round(x, 4) for x in one_sided(6, 60)]
    [0.0445, 0.1879]
    """
    low, high = proportion_confint(hits, n, alpha=0.10, method="beta") if n else (0.0, 1.0)
    return float(low), float(high)


def testable(table: pd.DataFrame) -> pd.DataFrame:
    """The draws in which a rule was asked and had something to read: past the precondition, and testable."""
    return table[(table.gate == "passed") & (table.verdict != "not testable")]


def error_rates(table: pd.DataFrame, *, only_testable: bool = False) -> pd.DataFrame:
    """Per claim: how often "supported" is said of a false claim and "contradicted" of a true one, and the power of both.

    Columns claim, error, hits, n, estimate, low, high (Wilson, 95 %), and `lower` and `upper`, exact one-sided bounds. Every
    claim of the table has its rows; on request they count only the draws in which its rule had something to read.
    """
    chosen = testable(table) if only_testable else table
    asked = {
        "false supported": ("false", "supported"), "false contradicted": ("true", "contradicted"),
        "power to support": ("true", "supported"), "power to contradict": ("false", "contradicted"),
    }  # fmt: skip
    rows = []
    for claim in sorted(table.claim.unique()):
        for name, (truth, verdict) in asked.items():
            part = chosen[(chosen.claim == claim) & (chosen.truth == truth)]
            hits, n = int((part.verdict == verdict).sum()), len(part)
            rows.append((claim, name, hits, n, *rate(hits, n), *one_sided(hits, n)))
    return pd.DataFrame(rows, columns=["claim", "error", "hits", "n", "estimate", "low", "high", "lower", "upper"])


def _by_group(table: pd.DataFrame, by: Sequence[str], hit: pd.Series) -> pd.DataFrame:
    """How often the condition holds in each group of rows, with intervals."""
    made = hit.groupby([table[name] for name in by]).agg(hits="sum", n="size").reset_index()
    shares = [rate(hits, n) for hits, n in zip(made.hits, made.n, strict=True)]
    return made.join(pd.DataFrame(shares, columns=["estimate", "low", "high"]))


def interval_coverage(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the finite intervals that hold the population value (of 500 new topics) up to `ROUNDING`, by quantity."""
    known = table[np.isfinite(table[["estimate", "ci_low", "ci_high", "population"]]).all(axis=1)]
    room = np.minimum(known.population - known.ci_low, known.ci_high - known.population)
    return _by_group(known, ["claim", "quantity"], room >= -ROUNDING).drop(columns="claim").set_index("quantity")


def power_curve(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Share of right verdicts (supported if true, contradicted if false) by claim, truth and a column (`topics`, `effect`)."""
    known = table[table.truth.isin(RIGHT)]
    return _by_group(known, ["claim", "truth", by], known.verdict == known.truth.map(RIGHT))


def ranking_quality(is_part: Sequence[bool], score: Sequence[float]) -> dict[str, float]:
    """How well scores find the members of a set: AUROC, average precision and precision at the size of the set.

    NaN where all or none are members.

    >>> ranking_quality([True, False, True, False], [3.0, 0.0, 2.0, 1.0])
    {'auroc': 1.0, 'average precision': 1.0, 'P@k': 1.0}
    """
    member, values = np.asarray(is_part, dtype=bool), np.asarray(score, dtype=float)
    if member.all() or not member.any():
        return dict.fromkeys(("auroc", "average precision", "P@k"), float("nan"))
    top = np.argsort(-values, kind="stable")[: int(member.sum())]
    return {
        "auroc": float(roc_auc_score(member, values)),
        "average precision": float(average_precision_score(member, values)),
        "P@k": float(member[top].mean()),
    }


def main_draws(folder: Path = paths.CALIBRATION) -> pd.DataFrame:
    """Verdicts of the draws that rates are computed from; a claim judged by its corrected rule has a name of its own.

    >>> sorted({name for name in main_draws().claim if name.startswith("C2")})
    ['C2', 'C2*']
    """
    table = read_shipped("verdicts", folder, or_empty=True).query("purpose == 'main'")
    # A table measured anew has the youngest corrections also on draws that had been seen when they were written.
    is_late = (table.rule == "corrected") & (table.seed < table.claim.map(JUDGED_FROM))
    draw = pd.Series(list(zip(table.kind, table.seed, strict=True)), table.index)
    table = table[~is_late | ((table.claim == "C1") & draw.isin(UNSEEN))]
    known = read_shipped("population", folder, or_empty=True).drop(columns="code")
    table = table.merge(known, how="left", on=["kind", "seed", "claim", "rule"], validate="one_to_one")
    return _named(table.assign(population_verdict=table.population_verdict.fillna("")))


def power_draws() -> pd.DataFrame:
    """Verdicts, named as in `main_draws`, of the models that were measured with several effects, topics and pairs a topic.

    Every model is there with each of them, so what differs along a curve is that number alone.
    """
    table = read_shipped("verdicts").query("purpose in ['effect', 'topics', 'pairs']")
    return _named(table.assign(effect=table.effect.round(3)))


def threshold_draws() -> pd.DataFrame:
    """Verdicts of the corrected rules on models built for a true `value` near the claim's threshold."""
    table = read_shipped("verdicts", or_empty=True).query("purpose == 'threshold' and rule == 'corrected'")
    known = read_shipped("population", or_empty=True).rename(columns={"population": "value"})
    return _named(table.merge(known.drop(columns="code"), on=["kind", "seed", "claim", "rule"], validate="one_to_one"))


def held_out_draws() -> pd.DataFrame:
    """Verdicts of held-out kinds on claims whose truth their construction decides, named as in `main_draws`."""
    return _named(read_shipped("verdicts", or_empty=True).query("purpose == 'held-out' and truth != 'open'"))


def support_curve(draws: pd.DataFrame) -> pd.DataFrame:
    """How often a rule says "supported", by the true value, of `threshold_draws`: below the threshold it is an error.

    Columns claim, value (the centre of a bin of width `BIN`; edges meet the threshold), n, hits, estimate, low, high, threshold.
    """
    known = draws[draws.claim.isin(SUPPORTED_FROM)]
    threshold = known.claim.map(SUPPORTED_FROM).astype(float)
    step = np.floor((known.value - threshold) / BIN + 1e-9)
    table = known.assign(threshold=threshold, value=(threshold + (step + 0.5) * BIN).round(6))
    made = _by_group(table, ["claim", "value", "threshold"], table.verdict == "supported")
    return made[["claim", "value", "n", "hits", "estimate", "low", "high", "threshold"]]


def _named(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(claim=[rule_name(one.claim, one.rule) for one in table.itertuples()])


def claim_rates(draws: pd.DataFrame) -> Rates:
    """For each claim (a corrected rule: "C2*") and error of `error_rates`, of testable draws: `hits` of `n` draws, `rate`, and
    `upper`, the exact 95 % bound.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in error_rates(draws, only_testable=True).query("n > 0").itertuples():
        numbers = {"hits": int(row.hits), "n": int(row.n), "rate": round(row.estimate, 4), "upper": round(row.upper, 4)}
        found.setdefault(str(row.claim), {})[str(row.error).replace(" ", "_")] = numbers
    return found


def with_held_out(rates: Rates, draws: pd.DataFrame) -> Rates:
    """The rates, and for each rule that supported a false claim of a held-out kind (`held_out_draws`) how often it did."""
    false = draws[draws.truth == "false"]
    counts = (false.verdict == "supported").groupby(false.claim).agg(hits="sum", n="size").query("hits > 0")
    new = {claim: {"held_out_supported": numbers} for claim, numbers in counts.to_dict("index").items()}
    return {claim: {**own, **new.get(claim, {})} for claim, own in rates.items()}


def draws_like(draws: pd.DataFrame, shape: tuple[int, bool] | None) -> tuple[pd.DataFrame, str]:
    """The draws whose models have half to twice as many layers and the same kind of attention, all where there are none.

    `shape`: the layers of the model at hand, and whether its attention slides; None if unknown. The sentence names them.
    """
    if shape is None:
        return draws, "all built models, since layers and attention of this one are not known"
    layers, slides = shape
    own = f"{layers} layers and {'sliding windows' if slides else 'full attention'}"
    if not slides:  # every built model has full attention
        n = np.array([layers_of(*key) for key in zip(draws.kind, draws.seed, strict=True)])
        near = draws[(2 * n >= layers) & (n <= 2 * layers)]
        if len(near):
            return near, f"built models with full attention and half to twice as many layers as this one ({layers})"
    return draws, f"all built models (6 to 9 layers, full attention), since none is like this one ({own})"


@cache
def layers_of(kind: str, seed: int) -> int:
    """The number of layers of a built model, from its design: no weight is drawn."""
    from organisms.compiled_design import draw_design  # brings torch along, which most pages need not load

    return draw_design(kind, seed).n_layers
