"""Texts of a sensitive set are named by id and hash, wherever a pair is shown."""

import json
from pathlib import Path

import pytest
from test_prompts import folder, rows

from companion.base.errors import InputError
from companion.mediation.study import Study, own_pair
from companion.model.load import load
from companion.prompts import pairs, positions, tokens
from companion.prompts.pairs import load_set, shown


@pytest.mark.parametrize(
    ("note", "hidden"),
    [
        (None, False),
        ('{"sensitive": false}', False),
        ('{"sensitive": true}', True),
        ("{}", True),
        ("{", True),
        ("[]", True),
    ],
)
def test_a_set_is_sensitive_if_its_note_does_not_deny_it(tmp_path: Path, note: str | None, hidden: bool) -> None:
    place = folder(tmp_path, rows())
    if note is not None:
        (place / "set.json").write_text(note)
    pair = load_set(place).pairs[3]
    assert pair.sensitive is hidden
    assert ("on 3" in shown(pair, "treated")) is not hidden
    assert (pair.id in shown(pair, "treated")) is hidden


@pytest.fixture(scope="module")
def study() -> Study:
    subject = load("embedded")
    content = load_set("embedded")
    first = [pairs.replace(pair, sensitive=True) for pair in content.pairs[:12]]
    return Study("x", subject, tuple(tokens.tokenize(first, subject.tokenizer)[0]), {}, {}, {})


def test_tokens_of_a_sensitive_pair_are_places_without_words(study: Study) -> None:
    pair, tokenizer = study.pairs[0], study.subject.tokenizer
    plain = positions.labels(pair.treated, tokenizer)
    hidden = positions.token_labels(pair, "treated", tokenizer)
    assert len(hidden) == len(plain) and hidden[0] == plain[0] and hidden[-1] == plain[-1]
    words = {word for word in pair.pair.treated.replace("?", "").replace(",", "").split() if len(word) > 2}
    assert not words & {label.strip("·") for label in hidden}
    assert hidden.count("(hidden)") >= len(words)


def test_a_readers_own_pair_on_a_sensitive_set_is_hidden_too(study: Study) -> None:
    pair = study.pairs[0].pair
    made = own_pair(study, pair.control, pair.treated, pair.treatment)
    assert pair.treated not in json.dumps(positions.token_labels(made, "treated", study.subject.tokenizer))
    with pytest.raises(InputError) as caught:
        own_pair(study, pair.control, pair.treated + " again and again", pair.treatment)
    assert not [word for word in pair.control.split() if len(word) > 4 and word in str(caught.value)]
