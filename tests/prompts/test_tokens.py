"""From user turns to token ids: template, offsets, equal lengths, first tokens, and groups of positions."""

from collections.abc import Mapping
from dataclasses import replace

import models
import numpy as np
import pytest
from models import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from companion.base import chat
from companion.base.errors import InputError
from companion.prompts import positions, tokens
from companion.prompts.pairs import SPAN_NAMES, Pair, PromptSet
from companion.prompts.tokens import TokenPair

# ---- tokens ----

WORDS = models.word_tokenizer()


def pair(control: str, treated: str, name: str = "p", spans: Mapping | None = None) -> Pair:
    return Pair(name, "T2", "topic", control, treated, split="test", spans=spans or {})


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
    tokenizer = models.word_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $0", special_tokens=[("<bos>", bos)])
    assert tokenizer("do")["input_ids"][0] == bos
    assert tokens.encode(tokenizer, "do off")[0].tolist().count(bos) == 1


TURNS = ["do off", "  do off", "do off \n", " do  off ", "user", "assistant", "<user>", "kind <end>", "e"]


@pytest.mark.parametrize("template", [models.TEMPLATE, models.STRIPPED, models.WITH_SYSTEM, models.BARE])
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
    changed = [models.TEMPLATE.replace("m.content", change) for change in ("m.content | upper", "'nothing'")]
    missing, other = "no chat template: .*chat_template.jinja", "changes the user turn's text"
    for template, message in ((None, missing), ("", missing), *((text, other) for text in changed)):
        with pytest.raises(InputError, match=message):
            tokens.encode(models.word_tokenizer(template), "do off")


HEAD = ("head of the user turn", "<bos> <user> be kind do off <end> <assistant>")
PLACES = [
    (models.TEMPLATE, "system turn", "<bos> <system> be kind <end> <user> do off <end> <assistant>"),
    (models.NO_SYSTEM, *HEAD), (models.DROPS_SYSTEM, *HEAD),
    (models.LAST_TURN, "not possible", ""), (None, "not possible", ""),
]  # fmt: skip


@pytest.mark.parametrize(("template", "place", "words"), PLACES)
def test_a_sentence_stands_where_the_template_shows_it(template: str | None, place: str, words: str) -> None:
    tokenizer = models.word_tokenizer(template)
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


def test_a_leading_space_is_significant_and_openers_that_decide_nothing_are_refused() -> None:
    tokenizer = byte_tokenizer(models.TEMPLATE.replace("<assistant> ", "<assistant>"), (("Ġ", "y"),))
    for string, first in (("yes", "y"), (" yes", "Ġy")):
        (found,) = tokens.openers(prompt_set((string,), ("no",)), tokenizer, 300)["T2"].comply
        assert decoded(tokenizer, np.array([found])) == [first]
    tokenizer = byte_tokenizer(models.TEMPLATE, (("Ġ", "y"),))  # this template ends in a space
    with pytest.raises(InputError, match="'yes' starts no token of its own behind the prompt"):
        tokens.openers(prompt_set(("yes",), ("no",)), tokenizer, 300)
    for comply, refuse, message in (
        (" ", ("no",), "' ' starts no token of its own"),
        ("perhaps", ("no",), "'perhaps' starts with a word that the tokenizer does not know"),
        ("yes well", ("no", "yes now"), "outcome of T2: comply and refuse share the first token"),
    ):
        with pytest.raises(InputError, match=message):
            tokens.openers(prompt_set((comply,), refuse), WORDS, len(WORDS))


# ---- positions ----

PARTITION = ("system", "header", *SPAN_NAMES, "rest", "last_instruction", "template", "last")
TEMPLATES = {
    "plain": models.TEMPLATE, "system": models.WITH_SYSTEM, "stripped": models.STRIPPED,
    "single turn": models.SINGLE_TURN, "bare": models.BARE,
}  # fmt: skip


def made(tokenizer, control: str, treated: str, spans: Mapping | None = None) -> TokenPair:
    found, reason = tokens.token_pair(pair(control, treated, spans=spans), tokenizer)
    assert found is not None, reason
    return found


def groups(tokenizer, control: str, treated: str, spans: Mapping | None = None) -> dict[str, list[str]]:
    """Words of the treated prompt by group, empty groups left out."""
    found = made(tokenizer, control, treated, spans)
    masks = positions.groups(found, positions.user_header(tokenizer))
    words = np.array(decoded(tokenizer, found.treated))
    return {name: words[mask].tolist() for name, mask in masks.items() if mask.any()}


def test_the_header_is_what_stands_before_every_user_turn() -> None:
    templates = {**TEMPLATES, "last turn only": models.TEMPLATE.replace("in messages", "in messages[-1:]")}
    headers = {name: positions.user_header(models.word_tokenizer(text)) for name, text in templates.items()}
    shown = {"plain": "<user> ", "system": " <end> <user> ", "stripped": "<user> "}
    assert headers == {**shown, "single turn": "", "bare": "", "last turn only": ""}


def test_groups_with_and_without_a_system_turn() -> None:
    assert groups(WORDS, "please off do it now", "please on do it now") == {
        "system": ["<bos>"], "header": ["<user>"], "rest": ["please", "on", "do", "it"], "last_instruction": ["now"],
        "template": ["<end>"], "last": ["<assistant>"], "differ": ["on"], "shared": ["do", "it", "now", "<end>", "<assistant>"],
        "others": ["<bos>", "<user>", "please", "on", "do", "it", "now", "<end>"],
        "all": ["<bos>", "<user>", "please", "on", "do", "it", "now", "<end>", "<assistant>"],
    }  # fmt: skip
    found = groups(models.word_tokenizer(models.WITH_SYSTEM), "off now", "on now")
    assert found["system"] == ["<bos>", "<system>", "be", "kind"]
    assert found["header"] == ["<end>", "<user>"] and found["rest"] == ["on"]
    found = groups(models.word_tokenizer(models.SINGLE_TURN), "off now", "on now")
    assert found["system"] == ["<bos>", "<user>"] and "header" not in found
    found = groups(models.word_tokenizer(models.BARE), "off now do", "on now do")
    assert {name: found[name] for name in PARTITION if name in found} == {"rest": ["on", "now"], "last": ["do"]}
    found = groups(WORDS, "off <user> <assistant>", "on <user> <assistant>")  # it repeats the template
    assert (found["header"], found["rest"]) == (["<user>"], ["on", "<user>"])
    assert (found["last_instruction"], found["template"]) == (["<assistant>"], ["<end>"])


@pytest.mark.parametrize("text", ["{} now", "  {} now", "{} now  ", " {} now\n "])
@pytest.mark.parametrize("template", [models.TEMPLATE, models.STRIPPED, models.WITH_SYSTEM])
def test_spaces_around_the_text_move_no_word_to_another_group(template: str, text: str) -> None:
    tokenizer = models.word_tokenizer(template)
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
    tokenizer = byte_tokenizer(models.TEMPLATE, (("o", "n"), ("Ġ", "on")))
    found = groups(tokenizer, "do off on it", "do on off it", {"treated": {"verb": [3, 5]}})
    assert found["verb"] == ["Ġon"]  # the space before the word is part of its token


def random_pair(rng: np.random.Generator, tokenizer) -> TokenPair:
    words, at = rng.choice(models.WORDS[4:], size=6).tolist(), int(rng.integers(6))
    texts = [" ".join([*words[:at], cue, *words[at + 1 :]]) for cue in ("low", "deep")]
    spans: dict = {"control": {}, "treated": {}}
    for side, text in zip(spans, texts, strict=True):
        for name in SPAN_NAMES:
            if rng.random() < 0.6:
                spans[side][name] = tuple(sorted(rng.choice(len(text) + 1, size=2, replace=False).tolist()))
    return made(tokenizer, *texts, spans)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_groups_partition_every_prompt(kind: str) -> None:
    tokenizer = models.word_tokenizer(TEMPLATES[kind])
    header, rng = positions.user_header(tokenizer), np.random.default_rng(0)
    for _ in range(40):
        masks = positions.groups(random_pair(rng, tokenizer), header)
        assert (np.sum([masks[name] for name in PARTITION], axis=0) == 1).all()
        assert set(masks) == {*PARTITION, *positions.OVERLAPPING}


def test_what_differs_and_is_shared_and_groups_that_stack_and_are_listed_in_reading_order() -> None:
    pair = made(WORDS, "do low be low now", "do high be high now")
    masks = positions.groups(pair, "<user> ")
    assert [np.flatnonzero(masks[name]).tolist() for name in ("differ", "shared")] == [[3, 5], [4, 6, 7, 8]]
    assert masks["all"].all() and positions.distance(pair) == 3
    stacked = positions.stack([made(WORDS, "off do", "on do"), made(WORDS, "do off", "do on")], "<user> ", "differ")
    assert stacked.dtype == bool and stacked.nonzero()[1].tolist() == [2, 3]
    pair = made(WORDS, "please off now do", "please on now do", {"treated": {"verb": (7, 9)}})
    masks = positions.groups(pair, positions.user_header(WORDS))
    assert positions.present(masks) == ["system", "header", "rest", "verb", "last_instruction", "template", "last"]


def test_labels_show_spaces_and_line_ends_and_of_a_sensitive_pair_places_without_words() -> None:
    blanks = models.sentencepiece(("▁yes",))  # the blank belongs to the token
    wanted = ((byte_tokenizer(), "a \n", ["a", "·", "\\n"]), (blanks, "x yes yes", ["x", "·yes", "·yes"]))
    for tokenizer, text, shown in wanted:
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert positions.labels(ids, tokenizer) == shown
    pair = made(WORDS, "please off now do", "please on now do")
    plain = positions.token_labels(pair, "treated", WORDS)
    assert plain == positions.labels(pair.treated, WORDS)
    hidden = replace(pair, pair=replace(pair.pair, sensitive=True))
    assert positions.token_labels(hidden, "treated", WORDS) == [*plain[:2], *["(hidden)"] * 4, *plain[6:]]
