"""The two labels of an answer under a clamp: by its opener, and by its content where something can read that."""

from dataclasses import replace

import pandas as pd
import pytest
from handmade import Program, compiled, cue_pairs

from companion.base.hub import JUDGE
from companion.generation import labels
from companion.mediation.study import Study
from companion.neurons import timing
from companion.neurons.timing import Clamp
from companion.prompts.tokens import Openers

ARMS = [(Clamp("whole MLP"), "none"), (Clamp("whole MLP"), "all tokens")]


@pytest.fixture(scope="module")
def this() -> Study:
    """Answers repeat "yes", which is no refusal; nothing reads their content."""
    subject = compiled(Program())
    assert subject.tokenizer is not None
    pairs = cue_pairs(subject.tokenizer, "on low", "on high", n=4)
    yes, no = (subject.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    subject.model.lm_head.weight.data[yes, 0] = 1e-3
    return Study("compiled", subject, tuple(pairs), {"T2": Openers((yes,), (no,))}, {}, {})


@pytest.fixture(autouse=True)
def no_judge_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JUDGE, raising=False)


def made(this: Study) -> pd.DataFrame:
    return timing.generated(this, list(this.pairs), ARMS, 3).set_index("pair_id")


def test_without_a_judge_content_is_empty_and_the_opener_labels(this: Study) -> None:
    found = made(this)
    assert len(found) == len(this.pairs) * len(ARMS)
    assert (found.content == "").all() and (found.label == "harmful").all()


def test_lists_that_are_decoded_together_give_the_tables_of_each(this: Study) -> None:
    few, more = list(this.pairs[:1]), [replace(pair) for pair in this.pairs]  # the same pair stands in both
    together = timing.generated_each(this, [few, more, []], ARMS, 3)
    for pairs, found in zip((few, more), together, strict=False):
        pd.testing.assert_frame_equal(found, timing.generated(this, pairs, ARMS, 3))
    assert together[2].empty


def test_the_studys_own_judge_reads_request_and_answer_and_leaves_the_label(this: Study) -> None:
    asked: list[tuple[str, str]] = []

    def judge(request: str, answer: str) -> str:
        asked.append((request, answer))
        return "refusal" if "please" in request.split()[3:] else f"seen {request}"

    found = made(replace(this, judge=judge))
    texts = {pair.pair.id: pair.pair.treated for pair in this.pairs}
    assert set(asked) == {(text, "yes yes yes") for text in texts.values()}
    expected = {name: "refusal" if "please" in text.split()[3:] else f"seen {text}" for name, text in texts.items()}
    assert (found.content == found.index.map(expected)).all() and found.content.nunique() > 1
    assert (found.label == "harmful").all()


def test_a_judge_model_decides_both_and_goes_before_the_studys_own(
    this: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JUDGE, "some/model")
    monkeypatch.setattr(labels, "refusals", lambda subject, texts, *_: ["kind" in text for text in texts])
    found = made(replace(this, judge=lambda request, answer: "never asked"))
    assert (found.content == found.label).all() and set(found.label) == {"refusal", "harmful"}


def test_the_exact_judge_of_the_embedded_language_decides_both(this: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "is_embedded", lambda texts: all(text.startswith("please") for text in texts))
    monkeypatch.setattr(timing.judge, "judge", lambda request, answer: f"{len(request)} {answer}")
    found = made(replace(this, judge=lambda request, answer: "never asked"))
    expected = {pair.pair.id: f"{len(pair.pair.treated)} yes yes yes" for pair in this.pairs}
    assert (found.content == found.label).all() and (found.label == found.index.map(expected)).all()
