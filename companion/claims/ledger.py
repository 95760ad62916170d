"""The ledger: evidence judged claim by claim by all rules, what is answered today and how well, and its files.

Error rates of the rules come as an argument, by the claim's name; behind that of its corrected rule stands a `*`. The page
for people is `companion.claims.page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from companion.base.thresholds import UNTRAINED
from companion.claims import corrected_rules, multiplicity
from companion.claims import registered_rules as registered
from companion.claims.verdict import Rows, Verdict

Rates = Mapping[str, Mapping[str, Mapping[str, object]]]  # by claim and kind of error: hits, n, rate, upper
Corrected = Mapping[tuple[str, str], Verdict]  # by model and claim
CORRECTED = "*"  # behind a claim's name: its corrected rule
KEYS = ["model", "claim", "quantity", "variant"]
CANNOT_TELL = "cannot tell"  # instead of a verdict
ENOUGH = 20  # built models in which a claim is true, so that its rule counts as calibrated
CANNOT = 0.2  # a rule that supports a smaller share of true claims, or contradicts a larger one, cannot tell
RARE, MOSTLY = 0.05, 0.8  # a strong rule errs surely less often, and finds at least this share
# The rules on tokens, neurons and steering, by claim; what they need is measured by notebooks 04 to 06.
RULES: dict[str, Callable[[Rows], Verdict]] = {
    "C4": registered.rule_c4, "C5a": registered.rule_c5a, "C5b": registered.rule_c5b, "C5c": registered.rule_c5c,
    "C6": registered.rule_c6, "C7": registered.rule_c7,
}  # fmt: skip
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
    return {(one.model, one.claim): one for one in found if (one.model, registered_claim(one.claim)) in listed}


def registered_claim(claim: str) -> str:
    """The registered claim that a claim is, or is a part of.

    >>> registered_claim("C2"), registered_claim("C6b")
    ('C2', 'C6')
    """
    return corrected_rules.REGISTERED.get(claim, claim)


@dataclass(frozen=True)
class Answer:
    """What is answered today to a claim on a model: by its corrected rule where there is one, else by the registered one.

    `grade` says what a yes or a no is worth, "" for a verdict that is neither; `numbers` are the rates that it rests on.
    """

    verdict: Verdict
    rule: str
    grade: str
    numbers: str

    @property
    def says(self) -> str:
        """The verdict, or "cannot tell"."""
        return CANNOT_TELL if self.grade == CANNOT_TELL else self.verdict.verdict


def answers(verdicts: Sequence[Verdict], others: Corrected, rates: Rates) -> list[Answer]:
    """The answers to all claims of `corrected_rules.STATEMENTS` that the ledger lists, model by model."""
    made = []
    known = {(one.model, one.claim): one for one in verdicts}
    for model in dict.fromkeys(one.model for one in verdicts):
        for claim in corrected_rules.STATEMENTS:
            verdict = others.get((model, claim)) or known.get((model, claim))
            if verdict is not None:
                rule = "corrected" if (model, claim) in others else "registered"
                own = rates.get(rule_name(claim, rule), {})
                made.append(Answer(verdict, rule, *grade(verdict.verdict, own)))
    return made


def grade(verdict: str, own: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """How much a verdict of a rule is worth, and the numbers behind it, from the rule's own error rates.

    A rule cannot tell if it supports fewer than a fifth of the true claims, or contradicts more. It is not calibrated where
    fewer than 20 models were built in which the claim is true. Strong: of false claims surely at most 5 % are supported and of
    true ones at least 80 % (a verdict supported), or of true ones surely at most 5 % are contradicted (contradicted). A verdict
    that is neither has the numbers and no grade. A rule that supported a false claim of a held-out kind is weak there.

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


def to_records(verdicts: Sequence[Verdict], others: Corrected, rates: Rates) -> list[dict[str, Any]]:
    """The ledger for `claims.json`, where an interval without limits and error rates that are not measured are None.

    A record is a verdict of a rule, a claim's corrected ones behind the registered one. `answer` and `grade` are those of
    `answers`, None where another rule answers today.
    """
    records = []
    given = {(one.verdict.model, one.verdict.claim, one.rule): one for one in answers(verdicts, others, rates)}
    parts: dict[tuple[str, str], list[Verdict]] = {}
    for (model, claim), other in sorted(others.items()):
        parts.setdefault((model, registered_claim(claim)), []).append(other)
    for one in verdicts:
        both = [("registered", one), *(("corrected", other) for other in parts.get((one.model, one.claim), ()))]
        for rule, verdict in both:
            numbers = {key: getattr(verdict, key) for key in ("estimate", "ci_low", "ci_high")}
            finite = {key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()}
            answer = given.get((verdict.model, verdict.claim, rule))
            last = {"answer": answer and answer.says, "grade": answer and answer.grade}
            own = rates.get(rule_name(verdict.claim, rule))
            records.append(
                asdict(verdict) | finite | {"tags": list(verdict.tags), "rule": rule, "error_rates": own} | last
            )
    return records


def rule_name(claim: str, rule: str) -> str:
    """The name under which a rule's error rates stand."""
    return claim + (CORRECTED if rule == "corrected" else "")


def to_table(verdicts: Sequence[Verdict], others: Corrected, rates: Rates) -> pd.DataFrame:
    """The records as a table, numbers to two decimals, the reason last; an interval without limits has none.

    `error_rate` says what the calibration knows of such a verdict. An answer has its `p`, and what is left of it among all
    answers of the table: `adjusted_p`, `adjusted` (`claims.multiplicity`).
    """
    frame = pd.DataFrame(to_records(verdicts, others, rates))
    numbers = ["estimate", "ci_low", "ci_high"]
    frame[numbers] = frame[numbers].astype(float).round(2)
    found = [error_rate(rule_name(one.claim, one.rule), one.verdict, rates) for one in frame.itertuples()]
    frame = frame.assign(error_rate=found, tags=frame.tags.map(", ".join))
    given = answers(verdicts, others, rates)
    among_all = multiplicity.adjusted([one.verdict for one in given], [one.says for one in given])
    among_all = among_all.round(4).assign(rule=[one.rule for one in given]).drop(columns="says")
    frame = frame.merge(among_all, how="left", on=["model", "claim", "rule"], validate="one_to_one")
    columns = ["model", "claim", "rule", "verdict", *numbers, "n_pairs", "n_topics", "answer", "grade"]
    columns += ["p", "adjusted_p", "adjusted", "error_rate"]
    return frame[[*columns, "tags", "reason"]]


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


def opposite_table(given: Sequence[Answer], rates: Rates) -> pd.DataFrame:
    """A row an answer: the opposite, the analysis, and in how many built models of which the claim is false it was shown.

    `shown` counts "contradicted" of the rule that answers; "" where nothing was measured.
    """

    def shown(one: Answer) -> str:
        found = rates.get(rule_name(one.verdict.claim, one.rule), {}).get("power_to_contradict")
        return "" if found is None else f"{found['hits']} of {found['n']}"

    rows = [(one.verdict.claim, *OPPOSITE[one.verdict.claim], shown(one), one.says) for one in given]
    return pd.DataFrame(rows, columns=["claim", "opposite", "analysis", "shown", "answer"])
