"""The ledger: evidence judged claim by claim by all rules, what is answered today, how well, and what stands among many.

Error rates of the rules come as an argument, by the claim's name; behind that of its corrected rule stands a `*`.

Many verdicts at once: which stand if one in twenty of those that are given may be wrong (Benjamini and Hochberg)? A verdict's p
is that of its comparison with a threshold: how far the number shown lies beyond it, in units of the half of its interval that
points there, as a normal deviate and two-sided. So p is at most 0.05 exactly where the interval clears the threshold, whatever
made the interval. A verdict that rests on another condition of its rule, and an interval without width, have no p.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as st

from companion.base.thresholds import POINTS, UNTRAINED
from companion.claims import registered_rules as registered
from companion.claims.corrected_rules import COSTS, STATEMENTS, corrected_verdicts
from companion.claims.verdict import AT_LEAST, Rows, Verdict, precondition

Rates = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by claim and kind of error: hits, n, rate, upper
CORRECTED = "*"  # behind a claim's name: its corrected rule
KEYS = ["model", "claim", "quantity", "variant"]
CANNOT_TELL = "cannot tell"  # instead of a verdict
ENOUGH = 20  # built models in which a claim is true, so that its rule counts as calibrated
CANNOT = 0.2  # a rule that supports a smaller share of true claims, or contradicts a larger one, cannot tell
RARE, MOSTLY = 0.05, 0.8  # a strong rule errs surely less often, and finds at least this share
ALWAYS = ("C1", "C2", "C3")  # listed for every model; what the other claims need is measured by notebooks 04 to 06
# By claim: the opposite, and what would show it, in which notebook.
OPPOSITE = {
    "C1": ("It arises early or in the middle, or no later than any other choice of the model.",
           "an upper limit of the late share at 0.40 or less (02)"),
    "C2": ("Attention blocks write it.", "an MLP share of direct effects of at most one half (03)"),
    "C3": ("Early layers do not understand it, or nothing uses what they understand.",
           "psi0 near 0 on tokens that do not differ (02)"),
    "C4": ("Attention, or nothing but the skip path, carries it on.", "MLPs carry at most 0.40 (05)"),
    "C5a": ("Many neurons share the work, or the last layer has none of it.",
            "k90 of a tenth of the neurons or more, or psi1 of the last MLP at most 0.15 (04)"),
    "C5b": ("They add what was decided before, and switch nothing.",
            "an index near 0 in every form that could show a gate (04b)"),
    "C5c": ("Every answer token decides anew.", "the first token keeps at most 0.40 of the effect (05)"),
    "C6a": ("Answers stay as harmful as they were, or any direction does as well.", "a fall of less than 2 points (06)"),
    "C6b": ("Harmless answers suffer.", "a cost surely above its margin (06)"),
    "C6c": ("Other layers defend as well.", "a rival with the same budget that does as well (06)"),
    "C7": ("The order of neurons says nothing.", "Moran's I at most 0.05, as after a permutation (04)"),
}  # fmt: skip
LEVEL = 0.05
# By quantity that must be small: supported up to here, contradicted from here on.
AT_MOST = {"harm change": (0.0, -POINTS), **{name: (most, most) for name, most in COSTS.items()}}


def ledger(evidence: pd.DataFrame, runs: Collection[str] = ()) -> list[Verdict]:
    """The verdicts of all rules on every model of an evidence table, a claim's corrected ones behind the registered one.

    Untrained twins are controls only. What notebooks 04 to 06 did not measure is listed, as not testable, for `runs` alone.
    """
    made = []
    models = [model for model in evidence.model.unique() if not model.endswith(UNTRAINED)]
    for model in sorted(models, key=lambda name: name not in runs):
        own = Rows(model, evidence)
        measured, corrected = set(own.table.claim), corrected_verdicts(own)
        for claim, rule in registered.RULES.items():
            if claim in ALWAYS or model in runs or claim in measured:
                made.append(precondition(own, claim) or rule(own))
                made += [one for one in corrected if one.claim.startswith(claim)]  # C6 has three parts
    return made


def rule_name(claim: str, rule: str) -> str:
    """The name under which a rule's error rates stand.

    >>> rule_name("C2", "registered"), rule_name("C2", "corrected")
    ('C2', 'C2*')
    """
    return claim + (CORRECTED if rule == "corrected" else "")


@dataclass(frozen=True)
class Answer:
    """What is answered today to a claim on a model: by its corrected rule where there is one, else by the registered one.

    `grade` says what a yes or a no is worth, "" for a verdict that is neither; `numbers` the rates behind it.
    """

    verdict: Verdict
    grade: str
    numbers: str

    @property
    def says(self) -> str:
        """The verdict, or "cannot tell"."""
        return CANNOT_TELL if self.grade == CANNOT_TELL else self.verdict.verdict


def answers(verdicts: Sequence[Verdict], rates: Rates) -> list[Answer]:
    """The answers to all claims of `STATEMENTS` in the ledger, model by model."""
    last = {(one.model, one.claim): one for one in verdicts}  # the corrected verdict stands behind the registered one
    return [
        Answer(one, *grade(one.verdict, rates.get(rule_name(claim, one.rule), {})))
        for (_, claim), one in last.items()
        if claim in STATEMENTS
    ]


def grade(verdict: str, own: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """How much a verdict of a rule is worth, and the numbers behind it, from the rule's own error rates.

    A rule cannot tell if it supports fewer than a fifth of the true claims, or contradicts more; it is not calibrated with fewer
    than 20 models in which the claim is true. Strong: of false claims surely at most 5 % are supported, none of a held-out kind,
    and of true ones at least 80 % (supported), or of true ones surely at most 5 % contradicted (contradicted). Else weak.

    >>> none = {"hits": 0, "n": 60, "rate": 0.0, "upper": 0.05}
    >>> grade("contradicted", {"power_to_support": none, "false_contradicted": none})
    ('cannot tell', '0 of 60 true claims supported, 0 contradicted')
    """
    if verdict == "not testable":
        return "", ""
    power, wrong, false = (own.get(name) for name in ("power_to_support", "false_contradicted", "false_supported"))
    if power is None or wrong is None or power["n"] < ENOUGH:
        return "not calibrated", f"true in {power['n']} built models" if power else "no built model says what is true"
    of_true = f"{power['hits']} of {power['n']} true claims supported, {wrong['hits']} contradicted"
    if power["rate"] < CANNOT or wrong["rate"] > CANNOT:
        return CANNOT_TELL, of_true
    of_false = "" if false is None else f"; {false['hits']} of {false['n']} false ones supported"
    if fooled := own.get("held_out_supported"):
        of_false += f", and {fooled['hits']} of {fooled['n']} of held-out kinds"
    if verdict == "supported":
        is_strong = false is not None and false["upper"] <= RARE and power["rate"] >= MOSTLY and not fooled
    else:
        is_strong = wrong["upper"] <= RARE
    return "" if verdict == "inconclusive" else "strong" if is_strong else "weak", of_true + of_false


def to_records(verdicts: Sequence[Verdict], rates: Rates) -> list[dict[str, Any]]:
    """The ledger for `claims.json`: None for an interval without limits, for error rates that were not measured, and for
    `answer` and `grade` where another rule answers today.
    """
    records = []
    given = {(one.verdict.claim, one.verdict.model, one.verdict.rule): one for one in answers(verdicts, rates)}
    for one in verdicts:
        numbers = {key: getattr(one, key) for key in ("estimate", "ci_low", "ci_high")}
        finite = {key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()}
        answer = given.get((one.claim, one.model, one.rule))
        own: dict[str, Any] = {"tags": list(one.tags), "error_rates": rates.get(rule_name(one.claim, one.rule))}
        own |= {"answer": answer and answer.says, "grade": answer and answer.grade}
        records.append(asdict(one) | finite | own)
    return records


def to_table(verdicts: Sequence[Verdict], rates: Rates) -> pd.DataFrame:
    """The records as a table, numbers to two decimals, each with its `error_rate`, the reason last.

    An answer has its `p`, and what is left of it among all answers of the table: `adjusted_p`, `adjusted`.
    """
    frame = pd.DataFrame(to_records(verdicts, rates))
    numbers = ["estimate", "ci_low", "ci_high"]
    frame[numbers] = frame[numbers].astype(float).round(2)
    frame = frame.assign(error_rate=[error_rate(one, rates) for one in verdicts], tags=frame.tags.map(", ".join))
    among_all = adjusted(answers(verdicts, rates)).round(4).drop(columns="says")
    frame = frame.merge(among_all, how="left", on=["model", "claim", "rule"], validate="one_to_one")
    columns = ["model", "claim", "rule", "verdict", *numbers, "n_pairs", "n_topics", "answer", "grade"]
    return frame[[*columns, "p", "adjusted_p", "adjusted", "error_rate", "tags", "reason"]]


def error_rate(one: Verdict, rates: Rates) -> str:
    """The rate that a reader of this verdict must know, as a phrase; "" where nothing was measured.

    Beside "supported": how often it is said of a false claim; "contradicted": of a true one; else how often a true one is found.

    >>> rates = {"C2": {"false_supported": {"hits": 0, "n": 60, "rate": 0.0, "upper": 0.0487}}}
    >>> error_rate(Verdict("m", "C2", "supported", ""), rates)
    'said of 0 of 60 false claims (at most 5 %)'
    """
    words = {
        "supported": ("false_supported", "said of {hits} of {n} false claims (at most {upper:.0%})"),
        "contradicted": ("false_contradicted", "said of {hits} of {n} true claims (at most {upper:.0%})"),
        "inconclusive": ("power_to_support", "true claims supported: {hits} of {n}"),
    }
    error, phrase = words.get(one.verdict, ("", ""))
    own = rates.get(rule_name(one.claim, one.rule), {})
    return phrase.format(**own[error]).replace("%", " %") if error in own else ""


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

    def beyond(threshold: float, towards: int) -> float:  # in half-lengths of the interval on the threshold's side
        gap, half = towards * (estimate - threshold), (estimate - low) if towards > 0 else (high - estimate)
        return gap / half if half > 0 else math.copysign(math.inf, gap)

    sides = {"supported": beyond(supported, sign), "contradicted": beyond(contradicted, -sign)}
    side = sides.get(verdict.verdict, max(sides.values()))
    if verdict.verdict in sides and side < 1 - 1e-9:
        return math.nan  # another condition of the rule decided: the number that is shown does not clear its threshold
    return float(min(1.0, 2 * st.norm.sf(side * st.norm.ppf(0.975))))


def adjusted(given: Sequence[Answer]) -> pd.DataFrame:
    """A row an answer: model, claim, rule, says, p, `adjusted_p` over all of them, and then the `adjusted` answer.

    A yes or no whose adjusted p is above 0.05 becomes inconclusive. Answers without a p stay, and do not count as tests.
    """
    rows = [(v.model, v.claim, v.rule, one.says, p_value(v)) for one in given for v in (one.verdict,)]
    table = pd.DataFrame(rows, columns=["model", "claim", "rule", "says", "p"]).assign(adjusted_p=np.nan)
    tested = table.p.notna()
    if tested.any():
        table.loc[tested, "adjusted_p"] = st.false_discovery_control(table.p[tested])
    falls = table.says.isin(["supported", "contradicted"]) & (table.adjusted_p > LEVEL)
    return table.assign(adjusted=table.says.mask(falls, "inconclusive"))


def opposite_table(given: Sequence[Answer], rates: Rates) -> pd.DataFrame:
    """A row an answer: the opposite, the analysis, and in how many built models of which the claim is false it was `shown`
    (the rule that answers said "contradicted"; "" where nothing was measured).
    """
    rows = []
    for one in given:
        found = rates.get(rule_name(one.verdict.claim, one.verdict.rule), {}).get("power_to_contradict")
        shown = f"{found['hits']} of {found['n']}" if found else ""
        rows.append((one.verdict.claim, *OPPOSITE[one.verdict.claim], shown, one.says))
    return pd.DataFrame(rows, columns=["claim", "opposite", "analysis", "shown", "answer"])
