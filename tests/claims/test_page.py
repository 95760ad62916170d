"""The page: what a reader finds on it, for fine evidence with some rows changed, and for the shipped run."""

import math

import pandas as pd
import pytest
from rows import FINE, LATER, PSI, TWIN, Numbers, row, table

from companion.base.thresholds import COMPUTED, CONTENT_JUDGE, KEPT_BY_FIRST_TOKEN, MLP_SHARE_WITH_OWN, UNTRAINED
from companion.calibration import rates
from companion.claims import ledger, page
from companion.claims.corrected_rules import STATEMENTS
from companion.claims.ledger import Answer
from companion.claims.verdict import Rows, Verdict
from companion.run import overview

ALL = FINE | LATER | row("C1", COMPUTED, (0.9, 0.8, 1.0), "main", "unsaturated")
ALL |= row("C4", MLP_SHARE_WITH_OWN, (0.9, 0.8, 1.0), "main", "norm frozen", "unsaturated")


def evidence_of(changes: Numbers | None = None, model: str = "m") -> pd.DataFrame:
    own = table(ALL | (changes or {}), model)
    own["note"] = own.note.mask(own.quantity == "not defined", "nothing can be kept")
    return pd.concat([own, table(TWIN, model + UNTRAINED)], ignore_index=True)


def answered(evidence: pd.DataFrame) -> list[Answer]:
    return ledger.answers(ledger.ledger(evidence, ("m",)), {})


HARD = row("C5c", "harmless answers changed, refusing run's values", (0.86, 0.7, 0.9))
BY_CONTENT = row("C5c", KEPT_BY_FIRST_TOKEN, (0.9, 0.8, 1.0), CONTENT_JUDGE)
BY_CONTENT |= row("C5c", "effect of all tokens", (0.8, 0.7, 0.9), CONTENT_JUDGE)
NONE_KEPT = row("C5c", KEPT_BY_FIRST_TOKEN, None) | row("C5c", "not defined", (0.0, 0.0, 0.0), "main", CONTENT_JUDGE)
SENTENCES: list[tuple[str, Numbers, str]] = [
    ("C1", {}, "late layers, what passes has its centre 20 [13, 27]% of the depth later than benign choices."),
    ("C1", row("gate", "earliest possible depth", (0.58, 0.58, 0.58)), "the attention windows let nothing arrive before 58%"),
    ("C1", row("C1", COMPUTED, (0.1, 0.0, 0.2), "main", "unsaturated"), "No: 10% of the decision"),
    ("C1", row("C1", COMPUTED, None, "main"), "70% of the effect passes through late layers"),
    ("C1", row("C1", "centroid difference", (-0.2, -0.3, -0.1)), "20 [13, 27]% of the depth earlier than"),
    ("C1", row("C1", COMPUTED, None, "unsaturated"), "; control: unsaturated pairs not run."),
    ("C2", {}, "Yes: MLP blocks write 85% of what"),
    ("C2", row("gate", "TE T2-T2b", (0.1, 0.0, 0.2)), "Undecided: the prompts move the answer by 0.1 log-odds only"),
    ("C3", row("C3", PSI, (1.0, 0.9, 1.1), "family verb"), "60% of the effect of a harmful request: 100% if the verb differs."),
    ("C4", {}, "Yes: from layer 3 on, where the last token takes over, MLPs carry 90% of the effect."),
    ("C4", row("C4", MLP_SHARE_WITH_OWN, None, "main", "norm frozen", "unsaturated"), "above layer 3 on, where"),
    ("C5a", {}, "Yes: 5 of 1000 neurons hold 90 % of the last MLP's effect (10 are allowed); 50% of the whole"),
    ("C5a", row("C5a", "k90", None), "no set of neurons holds"),
    ("C5b", {}, "Yes: the neurons switch like an AND (both signals needed), clamping them costs 10% of benign"),
    ("C5b", row("C5b", "gate index, signed", (-0.8, -0.9, -0.7)), "an OR (one signal does)"),
    ("C5b", row("C5b", "gate index, signed", (0.1, -0.1, 0.3)), "neither AND nor OR"),
    ("C5b", row("C5b", "gate index", None), "Undecided: no small set"),
    ("C5c", {}, "Not measured: answers were labelled by their opener"),
    ("C5c", BY_CONTENT, "90% of the effect of acting at every token; 5% of benign answers change."),
    ("C5c", BY_CONTENT | HARD, "5% of benign answers change, but 86% of harmless ones if set as in a refusal"),
    ("C5c", NONE_KEPT, "Undecided: nothing can be kept."),
    ("C5c", row("C5c", "not defined", (0.0, 0.0, 0.0), CONTENT_JUDGE), "Undecided: nothing can be kept."),
    ("C6a", {}, "Yes: harm falls by 60.0 points, 95% of the wrapper's effect is undone (75% asked); at most 1% of random"),
    ("C6a", row("C6", "harm change", (3.0, 1.0, 5.0)), "No: harm rises by 3.0 points"),
    ("C6b", {}, "Yes: 0.3 points of harmless answers are lost, over-refusal rises by 0.4 (at most 2 allowed)."),
    ("C6c", row("C6", "advantage over mid", (-3.0, -5.0, -1.0)), "40.0 points more than early ones and 3.0 points less than"),
    ("C6c", row("C6", "phi", None), "Not measured: steering was not measured: run notebook 06."),
    ("C7", row("C7", "Moran's I", (-0.001, -0.03, 0.02)), "neighbouring neurons is 0.00, and in a random order 0"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "changes", "part"), SENTENCES)
def test_an_answer_is_a_sentence_made_of_evidence(claim: str, changes: Numbers, part: str) -> None:
    evidence = evidence_of(changes)
    answer = next(one for one in answered(evidence) if one.verdict.claim == claim)
    assert part in page.sentence(answer, Rows("m", evidence))


def test_too_few_topics_are_not_called_too_small_an_effect() -> None:
    evidence = evidence_of({}).assign(n_topics=12)
    (answer,) = (one for one in answered(evidence) if one.verdict.claim == "C2")
    said = page.sentence(answer, Rows("m", evidence))
    assert said.startswith("Undecided: 12 topics of T2-T2b in the test split, 20 needed")


def test_a_rule_that_cannot_tell_gives_no_verdict_but_the_number() -> None:
    verdict = Verdict("m", "C2", "supported", "", "MLP share of direct effects", 0.85, 0.75, 0.95)
    answer = Answer(verdict, "cannot tell", "0 of 30")
    assert page.sentence(answer, Rows("m", evidence_of())).startswith("This rule cannot tell: MLP blocks write 85%")
    assert page.agreement(answer, [answer]) == ""
    assert page.key_number(verdict) == "85.0 [75.0, 95.0] % of direct effects"


def test_numbers_have_their_units() -> None:
    shown = {
        ("k90", 15.0, 14.0, 21.0): "15 [14, 21] neurons", ("TE T2", 0.1, -math.inf, math.inf): "0.10 [-inf, inf] log-odds",
        ("harm change", -15.66, -20.4, -11.1): "-15.7 [-20.4, -11.1] points of judged harm", ("",): "",
        ("late share", -0.001, -0.01, 0.01): "0 [-1, 1] % of the effect",
    }  # fmt: skip
    assert {one: page.key_number(Verdict("m", "C", "inconclusive", "", *one)) for one in shown} == shown


def test_models_agree_that_have_the_same_answer_and_were_asked() -> None:
    says = [
        ("C2", "supported"),
        ("C2", "supported"),
        ("C2", "contradicted"),
        ("C2", "not testable"),
        ("C3", "supported"),
    ]
    given = [Answer(Verdict(f"m{i}", *one, ""), "weak", "") for i, one in enumerate(says)]
    assert [page.agreement(one, given) for one in given] == ["2 of 3", "2 of 3", "1 of 3", "", "1 of 1"]


def test_a_relative_of_which_little_was_asked_is_not_in_the_picture() -> None:
    evidence = pd.concat([evidence_of(), evidence_of(model="kin")[lambda t: t.claim.isin(["gate", "C1", "C2", "C3"])]])
    table = page.picture_table("m", answered(evidence))
    assert set(table.model) == {"m"} and table.claim.tolist() == list(STATEMENTS)
    assert set(page.picture_table("kin", answered(evidence)).model) == {"m", "kin"}


def test_the_page_of_the_shipped_run_fits_two_screens() -> None:
    evidence = overview.run_evidence("embedded")
    draws, built = rates.draws_like(rates.main_draws(), overview.shape_of("embedded"))
    given = ledger.answers(ledger.ledger(evidence, ("embedded",)), rates.claim_rates(draws))
    scopes = {True: "Nothing. Model and language are invented", False: "about `embedded` and this prompt set alone"}
    for invented, scope in scopes.items():
        text = page.to_markdown("embedded", given, evidence, built, invented=invented)
        lines = text.splitlines()
        assert sum(max(1, math.ceil(len(line) / 130)) for line in lines) <= 90
        rows = [line for line in lines if line.startswith("| **C")]
        assert [line.split("**")[1] for line in rows] == list(STATEMENTS) and {line.count("|") for line in rows} == {7}
        assert lines[2].startswith("**What holds:**") and lines[4].startswith("**Undecided**") and scope in lines[6]
        words = {one.verdict.claim: one.says for one in given if one.verdict.model == "embedded"}
        for claim, says in words.items():  # a claim stands in the line of its answer, and nowhere else on top
            at = [says in ("supported", "contradicted"), says not in ("supported", "contradicted")]
            assert [f"({claim}" in lines[2], f"({claim})" in lines[4]] == at
        assert "not testable" not in text and "`claims.json`" in lines[-1] and "sliding windows" in text
