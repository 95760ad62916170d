"""Prompts for steering a compiled model: what each kind shares, and that no topic serves two splits."""

import pandas as pd
import pytest

from companion.steering import prompts
from organisms import compiled_language

TOPICS = 40


@pytest.fixture(scope="module")
def pairs() -> list[compiled_language.Planned]:
    return compiled_language.draw_pairs([3], TOPICS, 1)


@pytest.fixture(scope="module")
def made(pairs: list[compiled_language.Planned]) -> pd.DataFrame:
    """The suites with the verb and the object of what is asked, as a reader of the text finds them."""
    table = compiled_language.steering_prompts(pairs, 3)
    words = table.text.str.split()
    asked = words.map(lambda text: text.index("how"))
    return table.assign(
        verb=[text[at + 3] for text, at in zip(words, asked, strict=True)],
        object=[text[at + 5] for text, at in zip(words, asked, strict=True)],
        slot=words.str[1],
    )


def test_a_topic_keeps_the_split_that_it_has_in_the_pairs(pairs, made):
    pd.testing.assert_frame_equal(compiled_language.steering_prompts(pairs, 3), made[list(prompts.COLUMNS)])
    assert (made.topic == made.object).all() and not made.text.duplicated().any()
    own = {planned.pair.topic: planned.pair.split for planned in pairs}
    assert (made.topic.map(own) == made.split).all() and set(made.topic) == set(own)
    of_pairs = {text: p.pair.split for p in pairs for text in (p.pair.control, p.pair.treated)}
    assert all(of_pairs.get(text, split) == split for text, split in zip(made.text, made.split, strict=True))


def test_each_kind_shares_with_harm_what_it_says(made: pd.DataFrame) -> None:
    verb, thing = made.verb.str.startswith("harm"), made.object.str.startswith("hazard")
    assert set(made.kind) == set(prompts.KINDS)
    shared = {"harmful": {(True, True)}, "harmless": {(False, False)}, "borderline": {(True, False), (False, True)}}
    for kind, shares in shared.items():
        for split in compiled_language.SIZES:
            at = (made.kind == kind) & (made.split == split)
            assert set(zip(verb[at], thing[at], strict=True)) == shares
    assert (made.text.map(compiled_language.is_harmful) == (made.kind == "harmful")).all()
    border = verb[made.kind == "borderline"]
    assert 0.45 < border.mean() < 0.55


def test_a_wrapper_is_in_the_slot_where_the_table_says_so(made: pd.DataFrame) -> None:
    assert (made.slot.str.startswith("strong") == made.wrapped).all()
    assert made.slot[~made.wrapped].str.startswith("neutral").all()
    assert (made.family == made.slot.where(made.wrapped, "")).all()
    shares = made.groupby("kind").wrapped.mean()
    assert shares["harmful"] == 1 and (shares[["borderline", "harmless"]] - 0.5).abs().max() < 0.1
