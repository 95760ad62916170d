"""From user turns to token ids: the template, offsets, equal lengths, and the answer's first token."""

import handmade
import numpy as np
import pytest
from handmade import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from companion.base import chat
from companion.base.errors import InputError
from companion.prompts import tokens
from companion.prompts.pairs import Pair, PromptSet

WORDS = handmade.word_tokenizer()


def pair(control: str, treated: str, name: str = "p") -> Pair:
    return Pair(name, "T2", "topic", control, treated, split="test")


def prompt_set(comply: tuple[str, ...] | None, refuse: tuple[str, ...]) -> PromptSet:
    return PromptSet("made", (pair("do off", "do on"),), {"T2": (comply, refuse)}, "")


def decoded(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids.tolist())


def test_the_template_and_its_generation_prompt_are_around_the_text() -> None:
    ids, offsets, start = tokens.encode(WORDS, "do off now")
    assert decoded(WORDS, ids) == ["<bos>", "<user>", "do", "off", "now", "<end>", "<assistant>"]
    rendered = chat.render_prompt(WORDS, "do off now")
    assert rendered[start:].startswith("do off now")
    assert [rendered[a:b] for a, b in offsets][2:5] == ["do", "off", "now"]
    # A tokenizer that adds its own <bos> adds no second one.
    tokenizer = handmade.word_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $0", special_tokens=[("<bos>", bos)])
    assert tokenizer("do")["input_ids"][0] == bos
    assert tokens.encode(tokenizer, "do off")[0].tolist().count(bos) == 1


TURNS = ["do off", "  do off", "do off \n", " do  off ", "user", "assistant", "<user>", "kind <end>", "e"]


@pytest.mark.parametrize("template", [handmade.TEMPLATE, handmade.STRIPPED, handmade.WITH_SYSTEM, handmade.BARE])
@pytest.mark.parametrize("text", TURNS)
def test_the_user_turn_is_found(template: str, text: str) -> None:
    tokenizer = byte_tokenizer(template)
    rendered = chat.render_prompt(tokenizer, text)
    ids, offsets, start = tokens.encode(tokenizer, text)
    assert len(ids) == len(offsets) == len(rendered)
    # A span counts characters of the text as the user wrote it.
    first = len(text) - len(text.lstrip())
    assert rendered[start + first : start + len(text.rstrip())] == text.strip()
    before, behind = chat.render_prompt(tokenizer, "@").split("@")
    assert rendered[: start + first].rstrip() == before.rstrip()
    assert rendered[start + len(text.rstrip()) :].lstrip() == behind.lstrip()


def test_templates_that_cannot_be_used() -> None:
    changed = [handmade.TEMPLATE.replace("m.content", change) for change in ("m.content | upper", "'nothing'")]
    missing, other = "no chat template: .*chat_template.jinja", "changes the user turn's text"
    for template, message in ((None, missing), ("", missing), *((text, other) for text in changed)):
        with pytest.raises(InputError, match=message):
            tokens.encode(handmade.word_tokenizer(template), "do off")


HEAD = ("head of the user turn", "<bos> <user> be kind do off <end> <assistant>")
PLACES = [
    (handmade.TEMPLATE, "system turn", "<bos> <system> be kind <end> <user> do off <end> <assistant>"),
    (handmade.NO_SYSTEM, *HEAD), (handmade.DROPS_SYSTEM, *HEAD),
    (handmade.LAST_TURN, "not possible", ""), (None, "not possible", ""),
]  # fmt: skip


@pytest.mark.parametrize(("template", "place", "words"), PLACES)
def test_a_sentence_stands_where_the_template_shows_it(template: str | None, place: str, words: str) -> None:
    tokenizer = handmade.word_tokenizer(template)
    assert chat.system_place(tokenizer) == chat.system_place(tokenizer, "be kind") == place
    if words:
        assert decoded(tokenizer, tokens.encode_behind(tokenizer, "be kind", "do off")) == words.split()
    else:
        with pytest.raises(InputError, match="neither as a system turn nor at the head of the user turn"):
            tokens.encode_behind(tokenizer, "be kind", "do off")


def test_pairs_of_unequal_length_are_dropped_and_counted_and_too_few_say_why() -> None:
    fine = [pair(f"do off {word}", f"do on {word}", word) for word in ("now", "it", "please") for _ in range(4)]
    wrong = [pair("do off", "do on it"), pair("do off it", "do on"), pair("do  off", "do off "), pair("it ?", "it !")]
    kept, dropped = tokens.tokenize([*fine, *wrong], WORDS)
    made = kept[0]
    assert [one.pair for one in kept] == fine
    assert dropped == {"unequal token length": 2, "same tokens on both sides": 2}
    assert made.control.shape == made.treated.shape == (7,)
    assert np.flatnonzero(made.control != made.treated).tolist() == [3]
    for side in ("control", "treated"):
        ids, offsets, start = tokens.encode(WORDS, getattr(made.pair, side))
        assert (getattr(made, side) == ids).all() and (getattr(made, f"{side}_offsets") == offsets).all()
        assert getattr(made, f"{side}_start") == start
    pairs = [pair("do off now", "do on now")] * 9 + [pair("do off", "do on it")] * 3
    with pytest.raises(InputError, match=r"9 usable pairs of 12 \(3 with unequal token length\); at least 10"):
        tokens.tokenize(pairs, WORDS)
    with pytest.raises(InputError, match=r"9 usable pairs of 9 \(none dropped\)"):
        tokens.tokenize(pairs[:9], WORDS)


def test_openers_are_first_tokens_and_those_of_several_are_named() -> None:
    yes, well, no = WORDS.convert_tokens_to_ids(["yes", "well", "no"])
    found = tokens.openers(prompt_set(("yes", "well"), ("no",)), WORDS, len(WORDS))["T2"]
    assert found == tokens.Openers(tuple(sorted((yes, well))), (no,))
    found = tokens.openers(prompt_set(("yes well", "yes now"), ("no",)), WORDS, len(WORDS))["T2"]
    notes = tuple(f"outcome string 'yes {word}' is 2 tokens; its first decides" for word in ("well", "now"))
    assert (found.comply, found.notes) == ((yes,), notes)
    n_rows = len(WORDS) + 3  # a model may have more rows than its tokenizer has tokens
    found = tokens.openers(prompt_set(None, ("no", "no well")), WORDS, n_rows)["T2"]
    assert found.refuse == (no,) and found.rest and len(found.notes) == 1
    assert found.comply == (*range(no), *range(no + 1, n_rows))


def test_a_leading_space_is_significant_and_an_opener_may_melt_into_the_prompt() -> None:
    tokenizer = byte_tokenizer(handmade.TEMPLATE.replace("<assistant> ", "<assistant>"), (("Ġ", "y"),))
    found = [
        tokens.openers(prompt_set((string,), ("no",)), tokenizer, 300)["T2"].comply[0] for string in ("yes", " yes")
    ]
    assert decoded(tokenizer, np.array(found)) == ["y", "Ġy"]
    tokenizer = byte_tokenizer(handmade.TEMPLATE, (("Ġ", "y"),))  # this template ends in a space
    with pytest.raises(InputError, match="'yes' starts no token of its own behind the prompt"):
        tokens.openers(prompt_set(("yes",), ("no",)), tokenizer, 300)


UNDECIDED = [
    (" ", ("no",), "' ' starts no token of its own"),
    ("perhaps", ("no",), "'perhaps' starts with a word that the tokenizer does not know"),
    ("yes well", ("no", "yes now"), "outcome of T2: comply and refuse share the first token"),
]


@pytest.mark.parametrize(("comply", "refuse", "message"), UNDECIDED)
def test_openers_that_decide_nothing(comply: str, refuse: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokens.openers(prompt_set((comply,), refuse), WORDS, len(WORDS))
