"""Position groups of templates with and without a system turn, and of texts with spans, spaces and template words."""

from collections.abc import Mapping
from dataclasses import replace

import handmade
import numpy as np
import pytest
from handmade import byte_tokenizer

from companion.prompts import positions, tokens
from companion.prompts.pairs import SPAN_NAMES, Pair
from companion.prompts.tokens import TokenPair

PARTITION = ("system", "header", *SPAN_NAMES, "rest", "last_instruction", "template", "last")
TEMPLATES = {
    "plain": handmade.TEMPLATE, "system": handmade.WITH_SYSTEM, "stripped": handmade.STRIPPED,
    "single turn": handmade.SINGLE_TURN, "bare": handmade.BARE,
}  # fmt: skip
WORDS = handmade.word_tokenizer()


def made(tokenizer, control: str, treated: str, spans: Mapping | None = None) -> TokenPair:
    pair, reason = tokens.token_pair(Pair("p", "T2", "topic", control, treated, spans=spans or {}), tokenizer)
    assert pair is not None, reason
    return pair


def groups(tokenizer, control: str, treated: str, spans: Mapping | None = None) -> dict[str, list[str]]:
    """Words of the treated prompt by group, empty groups left out."""
    pair = made(tokenizer, control, treated, spans)
    masks = positions.groups(pair, positions.user_header(tokenizer))
    words = np.array(tokenizer.convert_ids_to_tokens(pair.treated.tolist()))
    return {name: words[mask].tolist() for name, mask in masks.items() if mask.any()}


def test_the_header_is_what_stands_before_every_user_turn() -> None:
    templates = {**TEMPLATES, "last turn only": handmade.TEMPLATE.replace("in messages", "in messages[-1:]")}
    headers = {name: positions.user_header(handmade.word_tokenizer(text)) for name, text in templates.items()}
    shown = {"plain": "<user> ", "system": " <end> <user> ", "stripped": "<user> "}
    assert headers == {**shown, "single turn": "", "bare": "", "last turn only": ""}


def test_groups_with_and_without_a_system_turn() -> None:
    assert groups(WORDS, "please off do it now", "please on do it now") == {
        "system": ["<bos>"], "header": ["<user>"], "rest": ["please", "on", "do", "it"], "last_instruction": ["now"],
        "template": ["<end>"], "last": ["<assistant>"], "differ": ["on"], "shared": ["do", "it", "now", "<end>", "<assistant>"],
        "others": ["<bos>", "<user>", "please", "on", "do", "it", "now", "<end>"],
        "all": ["<bos>", "<user>", "please", "on", "do", "it", "now", "<end>", "<assistant>"],
    }  # fmt: skip
    found = groups(handmade.word_tokenizer(handmade.WITH_SYSTEM), "off now", "on now")
    assert found["system"] == ["<bos>", "<system>", "be", "kind"]
    assert found["header"] == ["<end>", "<user>"] and found["rest"] == ["on"]
    found = groups(handmade.word_tokenizer(handmade.SINGLE_TURN), "off now", "on now")
    assert found["system"] == ["<bos>", "<user>"] and "header" not in found
    found = groups(handmade.word_tokenizer(handmade.BARE), "off now do", "on now do")
    assert {name: found[name] for name in PARTITION if name in found} == {"rest": ["on", "now"], "last": ["do"]}
    found = groups(WORDS, "off <user> <assistant>", "on <user> <assistant>")  # it repeats the template
    assert (found["header"], found["rest"]) == (["<user>"], ["on", "<user>"])
    assert (found["last_instruction"], found["template"]) == (["<assistant>"], ["<end>"])


@pytest.mark.parametrize("text", ["{} now", "  {} now", "{} now  ", " {} now\n "])
@pytest.mark.parametrize("template", [handmade.TEMPLATE, handmade.STRIPPED, handmade.WITH_SYSTEM])
def test_spaces_around_the_text_move_no_word_to_another_group(template: str, text: str) -> None:
    tokenizer = handmade.word_tokenizer(template)
    plain = groups(tokenizer, "off now", "on now")
    spans = {"treated": {"verb": [text.index("{"), text.index("{") + 2]}}
    assert groups(tokenizer, text.format("off"), text.format("on")) == plain
    with_span = groups(tokenizer, text.format("off"), text.format("on"), spans)
    assert with_span | {"rest": ["on"]} == plain | {"verb": ["on"], "request": ["on"]} and "rest" not in with_span


def test_spans_become_groups() -> None:
    spans = {"control": {"object": [10, 13]}, "treated": {"wrapper": [0, 6], "verb": [10, 12], "object": [13, 16]}}
    found = groups(WORDS, "please do low be now well", "please on do low now well", spans)
    # The control's object lies two words before the treated one, where the treated prompt has its verb: the
    # earlier name of the list keeps a token that two spans want.
    wanted = {"wrapper": ["please"], "verb": ["do"], "object": ["low"], "rest": ["on", "now"]}
    assert {name: found[name] for name in wanted} == wanted
    # A span takes every token that it touches in either prompt.
    spans = {"control": {"verb": [0, 2]}, "treated": {"verb": [3, 5]}}
    assert groups(WORDS, "do it now", "it do now", spans)["verb"] == ["it", "do"]
    tokenizer = byte_tokenizer(handmade.TEMPLATE, (("o", "n"), ("Ġ", "on")))
    found = groups(tokenizer, "do off on it", "do on off it", {"treated": {"verb": [3, 5]}})
    assert found["verb"] == ["Ġon"]  # the space before the word is part of its token


def random_pair(rng: np.random.Generator, tokenizer) -> TokenPair:
    words, at = rng.choice(handmade.WORDS[4:], size=6).tolist(), int(rng.integers(6))
    texts = [" ".join([*words[:at], cue, *words[at + 1 :]]) for cue in ("low", "deep")]
    spans: dict = {"control": {}, "treated": {}}
    for side, text in zip(spans, texts, strict=True):
        for name in SPAN_NAMES:
            if rng.random() < 0.6:
                spans[side][name] = tuple(sorted(rng.choice(len(text) + 1, size=2, replace=False).tolist()))
    return made(tokenizer, *texts, spans)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_groups_partition_every_prompt(kind: str) -> None:
    tokenizer = handmade.word_tokenizer(TEMPLATES[kind])
    header, rng = positions.user_header(tokenizer), np.random.default_rng(0)
    for _ in range(40):
        masks = positions.groups(random_pair(rng, tokenizer), header)
        assert (np.sum([masks[name] for name in PARTITION], axis=0) == 1).all()
        assert set(masks) == {*PARTITION, *positions.OVERLAPPING}


def test_differ_and_shared() -> None:
    pair = made(WORDS, "do low be low now", "do high be high now")
    masks = positions.groups(pair, "<user> ")
    assert np.flatnonzero(masks["differ"]).tolist() == [3, 5]
    assert np.flatnonzero(masks["shared"]).tolist() == [4, 6, 7, 8]
    assert masks["all"].all() and positions.distance(pair) == 3


def test_groups_stack_over_pairs_and_are_listed_in_reading_order() -> None:
    pairs = [made(WORDS, "off now do", "on now do"), made(WORDS, "do now off", "do now on")]
    stacked = positions.stack(pairs, "<user> ", "differ")
    assert stacked.dtype == bool and stacked.nonzero()[1].tolist() == [2, 4]
    pair = made(WORDS, "please off now do", "please on now do", {"treated": {"verb": (7, 9)}})
    masks = positions.groups(pair, positions.user_header(WORDS))
    assert positions.present(masks) == ["system", "header", "rest", "verb", "last_instruction", "template", "last"]


def test_labels_show_spaces_and_line_ends_and_keep_the_blank_that_belongs_to_a_token() -> None:
    blanks = handmade.sentencepiece(("▁yes",))
    wanted = ((byte_tokenizer(), "a \n", ["a", "·", "\\n"]), (blanks, "x yes yes", ["x", "·yes", "·yes"]))
    for tokenizer, text, shown in wanted:
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert positions.labels(ids, tokenizer) == shown


def test_labels_of_a_sensitive_pair_are_places_without_words() -> None:
    pair = made(WORDS, "please off now do", "please on now do")
    plain = positions.token_labels(pair, "treated", WORDS)
    assert plain == positions.labels(pair.treated, WORDS)
    hidden = replace(pair, pair=replace(pair.pair, sensitive=True))
    assert positions.token_labels(hidden, "treated", WORDS) == [*plain[:2], *["(hidden)"] * 4, *plain[6:]]
