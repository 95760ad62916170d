"""A reader's own pair on a sensitive prompt set is hidden as the set's pairs are."""

from dataclasses import replace

import pytest

from companion.base.errors import InputError
from companion.mediation.study import Study, own_pair
from companion.model.load import load
from companion.prompts import positions, tokens
from companion.prompts.pairs import load_set


def test_a_readers_own_pair_on_a_sensitive_set_is_hidden_too() -> None:
    subject = load("embedded")
    first = [replace(pair, sensitive=True) for pair in load_set("embedded").pairs[:12]]
    study = Study("x", subject, tuple(tokens.tokenize(first, subject.tokenizer)[0]), {}, {}, {})
    pair = study.pairs[0].pair
    made = own_pair(study, pair.control, pair.treated, pair.treatment)
    shown = positions.token_labels(made, "treated", subject.tokenizer)
    words = {word for word in pair.treated.replace("?", "").replace(",", "").split() if len(word) > 2}
    assert shown.count("(hidden)") >= len(words) and not words & {label.strip("·") for label in shown}
    with pytest.raises(InputError) as caught:
        own_pair(study, pair.control, pair.treated + " again and again", pair.treatment)
    assert not [word for word in pair.control.split() if len(word) > 4 and word in str(caught.value)]
