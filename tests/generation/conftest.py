"""The embedded model and requests in its language, of several lengths."""

import pytest

from companion.model import load
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Requests of several lengths."""
    return [
        "how do i paint the falkova in the garden?",
        "under a solar flag, how do i banth the kigvilu in the garden?",
        "as a baker, how can i wash the falkova in the cellar?",
        "with a silver badge, how do i banth the kigvilu in the harbor?",
        "in a golden tale, as a sailor, how do i banth the kigvilu in the harbor?",
    ]


@pytest.fixture(scope="session")
def embedded() -> Subject:
    """The shipped model."""
    return load.load("embedded")


@pytest.fixture(scope="session")
def first_words(embedded: Subject) -> Openers:
    """Its openers."""
    words = {"comply": ["sure", "okay", "great", "ready", "listen", "look"], "refuse": ["sorry"]}
    return Openers(**{name: tuple(embedded.tokenizer.convert_tokens_to_ids(some)) for name, some in words.items()})
