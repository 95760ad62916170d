"""Many verdicts at once: which of them stand if one in twenty of those that are given may be wrong (Benjamini and Hochberg).

A rule holds an interval against a threshold. Its p-value is that of this comparison: how far the number that the verdict shows
lies beyond the threshold, in units of the half of its interval that points there, as a normal deviate and two-sided. So p is at
most 0.05 exactly where the interval clears the threshold, whatever made the interval (bootstrap or t). The other conditions and
controls of a rule are not tested again. A verdict that rests on one of them, and an interval without width, have no p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats as st

from companion.base import thresholds
from companion.base.thresholds import COMPUTED, KEPT_BY_FIRST_TOKEN, MARGINS, MLP_SHARE, MLP_SHARE_WITH_OWN, POINTS
from companion.claims import registered_rules as registered
from companion.claims.verdict import Verdict

LEVEL = 0.05
# By quantity that a verdict shows: supported from here, contradicted up to here; then those that must be small, the other way.
AT_LEAST = {
    COMPUTED: (0.5, 0.4), "late share": (0.5, 0.4), "MLP share of direct effects": (0.6, 0.5), "MLP share of NIE": (0.6, 0.5),
    registered.PSI: (0.3, 0.1), MLP_SHARE: (0.6, 0.4), MLP_SHARE_WITH_OWN: (0.6, 0.4), "psi1": (0.3, 0.15),
    "gate index": (thresholds.GATE_LOW, thresholds.GATE_HIGH), "gate index, form": (thresholds.GATE_LOW, thresholds.GATE_HIGH),
    KEPT_BY_FIRST_TOKEN: (0.8, 0.4), "advantage over early": (0.0, POINTS), "advantage over mid": (0.0, POINTS),
    "Moran's I": (0.05, 0.05),
}  # fmt: skip
AT_MOST = {
    "harm change": (0.0, -POINTS),
    "harmless loss": (POINTS, POINTS),
    **{k: (most, most) for k, most in MARGINS.items()},
}


def p_value(verdict: Verdict) -> float:
    """p of the side that a verdict took, of an undecided one the smaller of both sides'; NaN where nothing can be compared.

    >>> made = Verdict("m", "C5a", "supported", "", "psi1", 0.4, 0.3, 0.6)
    >>> round(p_value(made), 3)  # its lower limit lies on the threshold
    0.05
    """
    quantity, estimate, low, high = verdict.quantity, verdict.estimate, verdict.ci_low, verdict.ci_high
    if quantity not in {*AT_LEAST, *AT_MOST} or estimate is None or low is None or high is None:
        return math.nan
    if not math.isfinite(high - low) or low == high:
        return math.nan
    sign, (supported, contradicted) = (-1, AT_MOST[quantity]) if quantity in AT_MOST else (1, AT_LEAST[quantity])

    def beyond(threshold: float, towards: int) -> float:
        """How far the estimate lies past a threshold, in half-lengths of the interval on the threshold's side."""
        gap, half = towards * (estimate - threshold), (estimate - low) if towards > 0 else (high - estimate)
        return gap / half if half > 0 else math.copysign(math.inf, gap)

    below, above = beyond(supported, sign), beyond(contradicted, -sign)
    sides = {"supported": below, "contradicted": above}
    side = sides.get(verdict.verdict, max(below, above))
    if verdict.verdict in sides and side < 1 - 1e-9:
        return (
            math.nan
        )  # another condition of the rule decided, and the number that is shown does not clear its threshold
    z = side * st.norm.ppf(0.975)
    return float(min(1.0, 2 * st.norm.sf(z)))


def adjusted(verdicts: Sequence[Verdict], says: Sequence[str]) -> pd.DataFrame:
    """The answers of a run, a row each: model, claim, says, p, `adjusted_p` over all of them, and then the `adjusted` answer.

    `says` is what is answered, which may be "cannot tell" for a verdict. Supported or contradicted whose adjusted p is above
    0.05 becomes inconclusive; nothing else changes. Answers without a p stay, and are not counted among the tests.
    """
    rows = [(v.model, v.claim, said, p_value(v)) for v, said in zip(verdicts, says, strict=True)]
    table = pd.DataFrame(rows, columns=["model", "claim", "says", "p"]).assign(adjusted_p=np.nan)
    tested = table.p.notna()
    if tested.any():
        table.loc[tested, "adjusted_p"] = st.false_discovery_control(table.p[tested])
    falls = table.says.isin(["supported", "contradicted"]) & (table.adjusted_p > LEVEL)
    return table.assign(adjusted=table.says.mask(falls, "inconclusive"))


def sentence_of_changes(own: str, verdicts: Sequence[Verdict], says: Sequence[str]) -> str:
    """What the page says of the model `own`: which of its answers are lost among so many tests; "" where none is."""
    table = adjusted(verdicts, says)
    lost = table[(table.model == own) & (table.says != table.adjusted)].claim.tolist()
    if not lost:
        return ""
    return (
        f"**Many questions at once.** With the {int(table.p.notna().sum())} tests of this run taken together (Benjamini and "
        f"Hochberg, {LEVEL:.0%}), these would be undecided: {', '.join(lost)}."
    )
