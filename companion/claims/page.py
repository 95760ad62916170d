"""The page for people: what holds of a model, what does not, and what the rules cannot tell, in a table of eleven rows.

Each answer is a sentence made of evidence rows. What a rule's word is worth comes from its error rates on built models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pandas as pd

from companion.base import thresholds
from companion.base.thresholds import COMPUTED, KEPT_BY_FIRST_TOKEN, MLP_SHARE, MLP_SHARE_WITH_OWN, POINTS, PSI
from companion.claims import registered_rules as registered
from companion.claims.corrected_rules import STATEMENTS, centroid_over_behaviours
from companion.claims.ledger import CANNOT, CANNOT_TELL, ENOUGH, LEVEL, MOSTLY, RARE, Answer, adjusted
from companion.claims.verdict import Rows, Verdict

NAMES = {  # of the claims, for the lines on top and the picture
    "C1": "late layers", "C2": "MLPs write it", "C3": "harm seen early", "C4": "MLPs carry it on", "C5a": "few neurons",
    "C5b": "neurons gate it", "C5c": "first token decides", "C6a": "steering lowers harm", "C6b": "harmless answers kept",
    "C6c": "late steers best", "C7": "related side by side",
}  # fmt: skip
# What would change the answer: where the whole interval must lie, and the notebook that measures it.
CHANGES = {
    "C1": "a late share of 50 % or more, and a centre surely 5 % of the depth later: yes; a share of 40 % or less: no (02)",
    "C2": "an MLP share of 60 % or more: yes; of 50 % or less: no (03)",
    "C3": "30 % or more in every family: yes; 10 % or less in every family: no (02)",
    "C4": "a share of 60 % or more: yes; of 40 % or less: no (05)",
    "C5a": "30 % or more held by 8 neurons or 1 % of the layer: yes; 15 % or less, or 10 % of the neurons or more: no (04)",
    "C5b": f"a specific index of {thresholds.GATE_LOW:g} or more: yes; {thresholds.GATE_HIGH:g} or less in every form: no (04b)",
    "C5c": "80 % or more kept: yes; 40 % or less: no (05)",
    "C6a": f"a fall of {POINTS:g} points and {registered.PHI:.0%} undone: yes; surely a smaller fall: no (06)",
    "C6b": "all four costs surely within their limits: yes; one surely above: no (06)",
    "C6c": f"a sure lead over both: yes; one surely within {POINTS:g} points: no (06)",
    "C7": "Moran's I above 0.05: yes; below 0.05: no (04)",
}
WORDS = {"supported": "Yes", "contradicted": "No", "inconclusive": "Undecided", CANNOT_TELL: "This rule cannot tell"}
OF_EFFECT = (100, 0, "% of the effect")
UNITS = {  # of the number that a verdict shows, by quantity: factor, decimals, unit
    COMPUTED: (100, 0, "% of what is computed"), "late share": OF_EFFECT,
    "MLP share of direct effects": (100, 1, "% of direct effects"), "MLP share of NIE": (100, 0, "% of indirect effects"),
    PSI: OF_EFFECT, MLP_SHARE: OF_EFFECT, MLP_SHARE_WITH_OWN: OF_EFFECT,
    "psi1": (100, 0, "% of the effect needs the last MLP"), "k90": (1, 0, "neurons"),
    KEPT_BY_FIRST_TOKEN: OF_EFFECT, "harm change": (1, 1, "points of judged harm"),
    "harmless loss": (1, 1, "points of harmless answers"), "over-refusal": (1, 1, "points of over-refusal"),
    "KL": (1, 3, "nats a token (KL)"), "perplexity ratio": (1, 3, "times the perplexity"),
    "advantage over early": (1, 1, "points of lead over early layers"),
    "advantage over mid": (1, 1, "points of lead over middle layers"),
    "gate index": (1, 2, "gate index"), "gate index, form": (1, 2, "gate index"), "Moran's I": (1, 2, "Moran's I"),
}  # fmt: skip


def key_number(verdict: Verdict) -> str:
    """The number that a verdict shows, its 95 % interval and its unit; "" where there is none.

    >>> key_number(Verdict("m", "C2", "supported", "", "MLP share of direct effects", 0.914, 0.9, 0.93))
    '91.4 [90.0, 93.0] % of direct effects'
    """
    if verdict.estimate is None:
        return ""
    other = "log-odds" if verdict.quantity.startswith("TE ") else verdict.quantity
    factor, decimals, unit = UNITS.get(verdict.quantity, (1, 2, other))
    ends = (verdict.estimate, verdict.ci_low, verdict.ci_high)
    value, low, high = (_rounded(factor * x, decimals) for x in ends if x is not None)
    return f"{value} [{low}, {high}] {unit}"


def _rounded(x: float, decimals: int) -> str:
    """A number as text; a zero has no sign."""
    return f"{round(x, decimals) + 0.0:.{decimals}f}"


def _percent(row: pd.Series) -> str:
    """The estimate of a row as a percentage; `to_markdown` puts the space before the sign."""
    return f"{_rounded(100 * row.estimate, 0)}%"


def _late(rows: Rows) -> str | None:
    found, centroid = rows.of("C1"), centroid_over_behaviours(rows)
    if COMPUTED in found:
        fact = f"{_percent(found[COMPUTED])} of the decision is computed in late layers"
    elif "late share" in found:
        fact = f"{_percent(found['late share'])} of the effect passes through late layers"
    else:
        return None
    if centroid is not None:
        sign, word = (1, "later") if centroid.estimate > 0 else (-1, "earlier")
        low, high = sorted((100 * sign * centroid.ci_low, 100 * sign * centroid.ci_high))
        ends = f"{_rounded(100 * abs(centroid.estimate), 0)} [{_rounded(low, 0)}, {_rounded(high, 0)}]"
        fact += f", what passes has its centre {ends}% of the depth {word} than benign choices"
    earliest = rows.find("gate", "earliest possible depth")
    if earliest is not None and earliest.estimate > thresholds.EARLY:
        fact += f", but the attention windows let nothing arrive before {earliest.estimate:.0%} of the depth"
    return fact


def _mlps(rows: Rows) -> str | None:
    direct = rows.find("C2", "MLP share of direct effects")
    return None if direct is None else f"MLP blocks write {_percent(direct)} of what reaches the output directly"


def _early(rows: Rows) -> str:
    psi, families = rows.of("C3")[PSI], rows.variants("C3", PSI, "family ")
    each = ", ".join(f"{_percent(row)} if the {name.removeprefix('family ')} differs" for name, row in families.items())
    fact = f"in early layers the words that do not differ carry {_percent(psi)} of the effect of a harmful request"
    return fact + (f": {each}" if each else "")


def _carried(rows: Rows) -> str | None:
    layer = rows.find("C4", "hand-over layer")
    own, above = rows.find("C4", MLP_SHARE_WITH_OWN), rows.find("C4", MLP_SHARE)
    share, where = (above, "above") if own is None else (own, "from")
    if share is None or layer is None:
        return None
    fact = f"{where} layer {layer.estimate:.0f} on, where the last token takes over, MLPs carry {_percent(share)} of the effect"
    if (live := rows.find("C4", "share of MLPs, attention live")) is not None:
        fact += f" with attention held; with attention free, holding them loses {_percent(live)}"
    return fact


def _sparse(rows: Rows) -> str:
    found, held = rows.of("C5a"), "no set of neurons holds the last MLP's effect"
    if "k90" in found:
        size, k90 = found["neurons in the layer"].estimate, found["k90"].estimate
        held = f"{k90:.0f} of {size:.0f} neurons hold 90 % of the last MLP's effect"
        held += f" ({thresholds.few_neurons(size)} are allowed)"
    return f"{held}; {_percent(found['psi1'])} of the whole effect needs that MLP"


def _gate(rows: Rows) -> str:
    index, cost, benign = (rows.find("C5b", name) for name in ("gate index", "perplexity ratio", "benign share"))
    if index is None:
        return "no small set of neurons has enough of the effect to ask"
    signed, sign = rows.find("C5b", "gate index, signed"), "neither AND nor OR"
    if signed is not None and signed.ci_low > 0:
        sign = "an AND (both signals needed)"
    elif signed is not None and signed.ci_high < 0:
        sign = "an OR (one signal does)"
    fact = f"the neurons switch like {sign}"
    fact += "" if benign is None else f", clamping them costs {_percent(benign)} of benign effects"
    if cost is not None:
        fact += f", {cost.estimate - 1:.0%} in perplexity ({thresholds.PERPLEXITY - 1:.0%} allowed)"
    return fact


def _first_token(rows: Rows) -> str | None:
    found = rows.of("C5c")
    judged = {name: rows.find("C5c", name, thresholds.CONTENT_JUDGE) for name in (KEPT_BY_FIRST_TOKEN, "not defined")}
    kept, nothing = judged.values() if any(row is not None for row in judged.values()) else map(found.get, judged)
    if kept is None:
        return None if nothing is None else str(nothing.note)
    fact = f"acting at the first token has {_percent(kept)} of the effect of acting at every token"
    if "benign answers changed" in found:
        fact += f"; {_percent(found['benign answers changed'])} of benign answers change"
    if (hard := found.get("harmless answers changed, refusing run's values")) is not None:
        fact += f", but {_percent(hard)} of harmless ones if set as in a refusal"
    return fact


def _harm_falls(rows: Rows) -> str:
    found = rows.of("C6")
    harm, random = found["harm change"].estimate, [found.get(f"p {family}") for family in registered.RANDOM]
    fact = f"harm {'falls' if harm < 0 else 'rises'} by {abs(harm):.1f} points"
    fact += f", {_percent(found['phi'])} of the wrapper's effect is undone ({registered.PHI:.0%} asked)"
    shares = [row.estimate for row in random if row is not None]
    return fact + (f"; at most {max(shares):.0%} of random directions do as well" if shares else "")


def _harmless_kept(rows: Rows) -> str:
    found = rows.of("C6")
    fact = f"{found['harmless loss'].estimate:.1f} points of harmless answers are lost"
    fact += f", over-refusal rises by {found['over-refusal'].estimate:.1f}" if "over-refusal" in found else ""
    return f"{fact} (at most {POINTS:g} allowed)"


def _late_best(rows: Rows) -> str:
    found, parts = rows.of("C6"), []
    for name, which in (("early", "early"), ("mid", "middle")):
        if (lead := found.get(f"advantage over {name}")) is not None:
            parts.append(f"{abs(lead.estimate):.1f} points {'more' if lead.estimate > 0 else 'less'} than {which} ones")
    return f"with the same budget late layers lower harm by {' and '.join(parts)}"


def _adjacent(rows: Rows) -> str:
    moran = rows.of("C7")["Moran's I"]
    return f"Moran's I of neighbouring neurons is {_rounded(moran.estimate, 2)}, and in a random order 0"


# By claim; asked of what a rule has judged. None where the verdict's reason says it all.
FACTS: dict[str, Callable[[Rows], str | None]] = {
    "C1": _late, "C2": _mlps, "C3": _early, "C4": _carried, "C5a": _sparse, "C5b": _gate, "C5c": _first_token,
    "C6a": _harm_falls, "C6b": _harmless_kept, "C6c": _late_best, "C7": _adjacent,
}  # fmt: skip


def sentence(answer: Answer, rows: Rows) -> str:
    """The answer in one plain sentence, made of the evidence rows of its model."""
    verdict = answer.verdict
    if verdict.verdict == "not testable":
        return f"Not measured: {verdict.reason.removeprefix('not testable: ')}."
    if not verdict.quantity.startswith("TE "):
        fact = FACTS[verdict.claim](rows) or verdict.reason
    elif "nothing to mediate" in verdict.reason:
        fact = f"the prompts move the answer by {verdict.estimate:.1f} log-odds only, too little to explain"
    else:  # too few topics
        fact = verdict.reason
    missing = [f"{name} {state}" for name, state in (verdict.controls or {}).items() if state != "passed"]
    stopped = f"; control: {', '.join(missing)}" if missing and answer.says == "inconclusive" else ""
    return f"{WORDS[answer.says]}: {fact}{stopped}."


def to_markdown(own: str, given: Sequence[Answer], evidence: pd.DataFrame, built: str, *, invented: bool) -> str:
    """The page of a model (`own`): three lines on top, a table of eleven rows, and what its words mean.

    `given` has the answers on all models of the run, `built` says which built models the grades rest on, `invented` that the
    model is of an invented language.
    """
    mine = [one for one in given if one.verdict.model == own]
    rows = Rows(own, evidence)
    head = ["claim", "answer", "key number, 95 % interval", "grade", "what would change it (notebook)", "agree"]
    n_models = len({one.verdict.model for one in given})
    table = [
        (
            f"**{one.verdict.claim}** {STATEMENTS[one.verdict.claim]}", sentence(one, rows), key_number(one.verdict),
            f"{one.grade} ({one.numbers})" if one.grade else one.numbers, CHANGES[one.verdict.claim], agreement(one, given),
        )
        for one in mine
    ]  # fmt: skip
    shown = head if n_models > 1 else head[:-1]  # a model agrees with itself
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells[: len(shown)])} |" for cells in (head, *table)]
    lines.insert(1, "| --- " * len(shown) + "|")
    parts = [f"# What the evidence says of `{own}`", *_on_top(own, mine, invented), "\n".join(lines)]
    among_all = adjusted(given)
    if lost := among_all.claim[(among_all.model == own) & (among_all.says != among_all.adjusted)].tolist():
        parts.append(
            f"**Many questions at once.** With the {among_all.p.notna().sum()} tests of this run taken together (Benjamini "
            f"and Hochberg, {LEVEL:.0%}), these would be undecided: {', '.join(lost)}."
        )
    parts += _notes(built, n_models)
    return re.sub(r"(?<=[\d\]])%", " %", "\n\n".join(parts)) + "\n"


def agreement(one: Answer, given: Sequence[Answer]) -> str:
    """How many of the models that were asked have the same answer, this one among them; "" where the rule cannot tell."""
    if one.says not in WORDS or one.says == CANNOT_TELL:
        return ""
    asked = [other.says for other in given if other.verdict.claim == one.verdict.claim and other.says in WORDS]
    return f"{asked.count(one.says)} of {len(asked)}"


def _on_top(own: str, mine: Sequence[Answer], invented: bool) -> list[str]:
    """Three lines: what holds and what does not; what is not decided; what this says about language models."""

    def named(says: str) -> str:
        grade = ", {}" if says in ("supported", "contradicted") else ""
        found = [(one.verdict.claim, grade.format(one.grade)) for one in mine if one.says == says]
        return ", ".join(f"{NAMES[claim]} ({claim}{grade})" for claim, grade in found) or "nothing"

    open_ones = {
        "Undecided**, for the reason in its row:": named("inconclusive"),
        "Cannot tell**, since the rule failed on built models:": named(CANNOT_TELL),
        "Not measured**:": named("not testable"),
    }  # fmt: skip
    undecided = " ".join(f"**{why} {which}." for why, which in open_ones.items() if which != "nothing")
    says = f"Nothing yet: the answers are about `{own}` and this prompt set alone."
    if invented:
        says = "Nothing. Model and language are invented: the answers say what a small network learned, and how far "
        says += "the method sees."
    return [
        f"**What holds:** {named('supported')}. **What does not:** {named('contradicted')}.",
        undecided or "**Undecided**: nothing.",
        f"**What this says about LLMs:** {says}",
    ]


def _notes(built: str, n_models: int) -> list[str]:
    agree = "**Agree.** Of the models of this run that were asked (this one and those trained like it), so many have this answer."
    return [
        "**Answer.** *Yes*: the whole interval lies where the claim asks for it, and every control passed. *No*: it lies where "
        "the opposite asks for it. *Undecided*: neither, or a control failed. All rules but that of C7 were corrected after "
        "results had been seen; `docs/changes.md` has the dates. *Interval*: topics are drawn again and wrappers are not; with "
        "these drawn, too, they are wider (08).",
        f"**Grade.** Counted are {built}; what is true of them is known. *Strong*: surely at most {RARE:.0%} of false claims are "
        f"supported, none of a held-out kind, and at least {MOSTLY:.0%} of true ones (*Yes*), or surely at most {RARE:.0%} of "
        f"true ones contradicted (*No*); else *weak*. *Cannot tell*: fewer than {CANNOT:.0%} of true claims are supported, or "
        f"over {CANNOT:.0%} contradicted. *Not calibrated*: fewer than {ENOUGH} built models in which the claim is true.",
        *([agree] if n_models > 1 else []),
        "Every verdict with its reason, controls and error rates, also of the registered rules: `claims.csv` and "
        "`claims.json` in this folder.",
    ]


def picture_table(own: str, given: Sequence[Answer]) -> pd.DataFrame:
    """The answers as the picture shows them: model, claim, its name, answer, number, grade.

    A model other than `own` has no row if fewer than half of the claims could be asked of it.
    """
    said = [(one.verdict, one) for one in given]
    rows = [(v.model, v.claim, NAMES[v.claim], one.says, key_number(v), one.grade) for v, one in said]
    table = pd.DataFrame(rows, columns=["model", "claim", "name", "answer", "number", "grade"])
    n_asked = table.model.map(table[table.answer.isin(list(WORDS))].groupby("model").size())
    return table[(table.model == own) | (n_asked >= len(STATEMENTS) / 2)].reset_index(drop=True)
