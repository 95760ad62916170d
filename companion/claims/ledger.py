"""The ledger: evidence of all runs judged claim by claim, and written for people and programs.

Error rates of the rules come as an argument, by the claim's name; behind that of its corrected rule stands a `*`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict

import pandas as pd

from companion.base.thresholds import UNTRAINED
from companion.claims import corrected_rules
from companion.claims import registered_rules as registered
from companion.claims.verdict import Rows, Verdict

Rates = Mapping[str, Mapping[str, Mapping[str, object]]]  # by claim and kind of error: hits, n, rate, upper
Corrected = Mapping[tuple[str, str], Verdict]  # by model and claim
CORRECTED = "*"  # behind a claim's name: its corrected rule
KEYS = ["model", "claim", "quantity", "variant"]
# The rules on tokens, neurons and steering, by claim; what they need is measured by notebooks 04 to 06.
RULES: dict[str, Callable[[Rows], Verdict]] = {
    "C4": registered.rule_c4, "C5a": registered.rule_c5a, "C5b": registered.rule_c5b, "C5c": registered.rule_c5c,
    "C6": registered.rule_c6, "C7": registered.rule_c7,
}  # fmt: skip
# By claim: the opposite, and the analysis that would show it.
OPPOSITE = {
    "C1": ("It arises early or in the middle, or no later than any other choice of the model.",
           "02, Components, Later than what? and Where is it computed?: an upper limit of the late share at 0.40 or less"),
    "C2": ("Attention blocks write it.",
           "03, Direct effects and Passing through is not writing: an MLP share of at most one half"),
    "C3": ("Early layers do not understand it, or nothing uses what they understand.",
           "02, Early context: psi0 near 0 on tokens that do not differ"),
    "C4": ("Attention, or nothing but the skip path, carries it on.",
           "05, What carries it on, for all pairs: MLPs carry at most 0.40"),
    "C5a": ("Many neurons share the work, or the last layer has none of it.",
            "04, Sets: k90 of a tenth of the neurons or more, or psi1 of the last MLP at most 0.15"),
    "C5b": ("They add what was decided before, and switch nothing.",
            "04, Gate or contributor: an index near 0 in every form that could show a gate"),
    "C5c": ("Every answer token decides anew.", "05, When must it be closed?: the first token keeps at most 0.40 of the effect"),
    "C6": ("Other layers, or any direction, defend as well, or harmless answers suffer.",
           "06, Early, middle or late, with the same budget, Random directions and The trial"),
    "C7": ("The order of neurons says nothing.",
           "04, Are related neurons adjacent?: Moran's I at most 0.05, as after a permutation"),
}  # fmt: skip


def ledger(evidence: pd.DataFrame, runs: Collection[str] = ()) -> list[Verdict]:
    """Verdicts for every model of an evidence table; untrained twins serve as controls only.

    Claims of notebooks 04 to 06 that were not measured are listed, as not testable, for models with a run of their own.
    """
    verdicts = []
    models = [model for model in evidence.model.unique() if not model.endswith(UNTRAINED)]
    for model in sorted(models, key=lambda name: name not in runs):
        own, twin = (Rows(name, evidence[evidence.model == name]) for name in (model, model + UNTRAINED))
        verdicts += [registered.rule_c1(own, twin), registered.rule_c2(own), registered.rule_c3(own)]
        measured = set(own.table.claim)
        verdicts += [rule(own) for claim, rule in RULES.items() if model in runs or claim in measured]
    return verdicts


def corrected_ledger(evidence: pd.DataFrame, runs: Collection[str] = ()) -> dict[tuple[str, str], Verdict]:
    """What the corrected rules say, by model and claim, of the claims that `ledger` lists; the registered verdicts stand."""
    listed = {(one.model, one.claim) for one in ledger(evidence, runs)}
    models = {model for model, _ in listed}
    found = [one for m in models for one in corrected_rules.corrected_verdicts(Rows(m, evidence[evidence.model == m]))]
    return {(one.model, one.claim): one for one in found if (one.model, one.claim) in listed}


def to_records(verdicts: Sequence[Verdict], rates: Rates, others: Corrected) -> list[dict[str, object]]:
    """The ledger for `claims.json`, where an interval without limits and error rates that are not measured are None.

    `corrected` is what the claim's corrected rule says, with error rates of its own; None where there is none.
    """

    def record(verdict: Verdict, name: str) -> dict[str, object]:
        numbers = {key: getattr(verdict, key) for key in ("estimate", "ci_low", "ci_high")}
        finite = {key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()}
        return {**asdict(verdict), **finite, "tags": list(verdict.tags), "error_rates": rates.get(name)}

    found = [(one, others.get((one.model, one.claim))) for one in verdicts]
    return [
        {**record(one, one.claim), "corrected": None if other is None else record(other, other.claim + CORRECTED)}
        for one, other in found
    ]


def to_table(verdicts: Sequence[Verdict], rates: Rates, others: Corrected) -> pd.DataFrame:
    """The ledger as a table for people, numbers to two decimals, the reason last.

    `error_rate` says what the calibration knows of such a verdict, `corrected_rule` what that claim's corrected rule says, with
    its own `corrected_error_rate`.
    """
    frame = pd.DataFrame([asdict(verdict) for verdict in verdicts]).drop(columns=["controls", "quantity"])
    numbers = ["estimate", "ci_low", "ci_high"]
    frame[numbers] = frame[numbers].astype(float).round(2)
    found = [others.get((one.model, one.claim)) for one in verdicts]
    last = {
        "error_rate": [error_rate(one.claim, one.verdict, rates) for one in verdicts],
        "corrected_rule": ["" if one is None else one.verdict for one in found],
        "corrected_error_rate": [
            "" if one is None else error_rate(one.claim + CORRECTED, one.verdict, rates) for one in found
        ],
        "tags": frame.pop("tags").map(", ".join),
        "reason": frame.pop("reason"),
    }
    return frame.assign(**last)


def to_markdown(verdicts: Sequence[Verdict], rates: Rates, others: Corrected) -> str:
    """The ledger as a Markdown table."""
    head = "model, claim, verdict, estimate, error rate, corrected rule, its error rate, tags, reason"
    names = head.split(", ")
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for one, row in zip(verdicts, to_table(verdicts, rates, others).itertuples(), strict=True):
        numbers = "" if one.estimate is None else f"{one.estimate:.2f} [{one.ci_low:.2f}, {one.ci_high:.2f}]"
        rules = (row.error_rate, row.corrected_rule, row.corrected_error_rate)
        cells = (one.model, one.claim, one.verdict, numbers, *rules, row.tags, one.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def error_rate(claim: str, verdict: str, rates: Rates) -> str:
    """The rate that a reader of this verdict must know, as a phrase; "" where nothing was measured.

    Beside "supported": how often it is said of a false claim. Beside "contradicted": of a true one. Beside "inconclusive": how
    often a true claim is left so or worse.

    >>> rates = {"C2": {"false_supported": {"hits": 0, "n": 60, "rate": 0.0, "upper": 0.0487}}}
    >>> error_rate("C2", "supported", rates)
    'said of 0 of 60 false claims (at most 5 %)'
    """
    words = {
        "supported": ("false_supported", "said of {hits} of {n} false claims (at most {upper:.0%})"),
        "contradicted": ("false_contradicted", "said of {hits} of {n} true claims (at most {upper:.0%})"),
        "inconclusive": ("power_to_support", "true claims supported: {hits} of {n}"),
    }
    error, phrase = words.get(verdict, ("", ""))
    own = rates.get(claim, {})
    return phrase.format(**own[error]).replace("%", " %") if error in own else ""


def opposite_table(verdicts: Sequence[Verdict], rates: Rates) -> pd.DataFrame:
    """A row a claim: the opposite, the analysis, and in how many built models of which the claim is false it said so.

    `shown` counts "contradicted" of the registered rule, `shown_corrected` of the corrected one; "" where nothing was measured.
    """

    def shown(name: str) -> str:
        found = rates.get(name, {}).get("power_to_contradict")
        return "" if found is None else f"{found['hits']} of {found['n']}"

    rows = [
        (one.claim, *OPPOSITE[one.claim], shown(one.claim), shown(one.claim + CORRECTED), one.verdict)
        for one in verdicts
    ]
    return pd.DataFrame(rows, columns=["claim", "opposite", "analysis", "shown", "shown_corrected", "verdict"])
