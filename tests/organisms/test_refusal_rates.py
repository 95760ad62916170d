"""What a model refuses: counts and intervals on answers that a test writes, and a table without any text of a prompt."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.prompts.pairs import Pair
from companion.stats.clusters import wilson
from organisms import refusal_rates

SAID = {
    "harm": "Sorry, but I can't help with that.",
    "sorry": "Sorry to hear it: open the lock.",
    "safe": "First, open the lock.",
}
SETS = [("harm", "safe", "verb"), ("harm", "safe", "verb"), ("safe", "sorry", "object"), ("harm", "sorry", "object")]
PAIRS = [
    Pair(f"p{i}", "T1", f"topic {i}", control, treated, family=family, split="test")
    for i, (treated, control, family) in enumerate(SETS)
]


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_rates.decode, "answers", lambda subject, texts, steps: texts)
    monkeypatch.setattr(refusal_rates.decode, "answer_texts", lambda subject, texts: [SAID[text] for text in texts])


def test_refusals_are_counted_by_label_and_family() -> None:
    other = Pair("q", "T1", "topic q", "safe", "harm", family="verb", split="discover")
    content = SimpleNamespace(pairs=(*PAIRS, other))
    table = pd.DataFrame(refusal_rates.set_rates(None, content, "test"), columns=refusal_rates.COLUMNS)
    found = table.set_index("prompts")
    assert found.loc[["harmful", "harmful, verb", "harmful, object"], ["estimate", "n"]].values.tolist() == [
        [0.75, 4], [1, 2], [0.5, 2]
    ]  # fmt: skip
    assert found.loc["harmful", ["low", "high"]].tolist() == list(wilson(3, 4))
    # An answer that opens with the word counts as a refusal in the outcome, whatever it goes on to say.
    assert found.loc["harmless twins", "estimate"] == 0.5 and found.loc["both", ["estimate", "n"]].tolist() == [
        3 / 5,
        5,
    ]
    assert set(table.split) == {"test"}
    helpful = SimpleNamespace(pairs=[Pair("p", "T1", "t", "safe", "safe", family="verb", split="test")])
    assert "both" not in {row[1] for row in refusal_rates.set_rates(None, helpful, "test")}, (
        "no answer opens with the word"
    )


def test_wrappers_move_the_log_odds_by_family(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"plain": 1.0, "wrapped": 3.0, "other": 0.5}
    pairs = [Pair(f"p{i}", "T2", f"topic {i // 2}", "plain", ("wrapped", "other")[i % 2], family="ab"[i % 2], split="test")
             for i in range(6)]  # fmt: skip
    monkeypatch.setattr(refusal_rates.tokens, "openers", lambda *_: {"T2": None})
    monkeypatch.setattr(
        refusal_rates.outcomes, "log_odds",
        lambda subject, texts, openers: pd.DataFrame({"log_odds": [moved[text] for text in texts]}),
    )  # fmt: skip
    subject = SimpleNamespace(tokenizer="any", unembedding=[np.zeros((9, 1))])
    content = SimpleNamespace(pairs=pairs, treatments=("T1", "T2"))
    found = refusal_rates.effect_rows(subject, content, "test")
    assert [row[1:] for row in found] == [("T2, a", "test", 2, 2, 2, 3), ("T2, b", "test", -0.5, -0.5, -0.5, 3)]


def test_a_file_of_prompts_is_counted_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("harm\n\nsafe\nsorry\n")
    assert refusal_rates.other_rates(None, "own", tmp_path / "own.txt") == [
        ("greedy refusal", "own", "", 2 / 3, *wilson(2, 3), 3)
    ]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt: one a line"):
        refusal_rates.other_rates(None, "none", tmp_path / "none.txt")
