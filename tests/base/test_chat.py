"""What chat templates do: with a system turn, the date, thinking, and the end of an answer; and the text of a token."""

from datetime import datetime

import handmade
import numpy as np
import pytest

from companion.base import chat
from companion.base.errors import InputError

REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + handmade.TEMPLATE
)
DROPS = handmade.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
FIRST_WORD = handmade.TEMPLATE.replace("{{ m.content }}", "{{ (m.content.split() | last) }}").replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
)
DATED = "{{ strftime_now('%d %b %Y') }} " + handmade.TEMPLATE
LLAMA = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }} " + handmade.TEMPLATE
)
THINKS = handmade.TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}"


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (handmade.TEMPLATE, "system turn"),
        (REFUSES, "head of the user turn"),
        (DROPS, "head of the user turn"),
        (FIRST_WORD, "not possible"),
    ],
    ids=["takes", "refuses", "drops", "cuts"],
)
def test_how_a_template_takes_a_system_turn(template: str, found: str) -> None:
    facts = chat.template_facts(handmade.word_tokenizer(template))
    assert facts is not None and facts.system == found


@pytest.mark.parametrize("template", [DATED, LLAMA])
def test_a_prompt_is_the_same_on_every_day_and_the_day_is_said(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.2 and Granite print the date: tables changed daily, and notebooks on either side of midnight disagreed."""
    tokenizer = handmade.word_tokenizer(template)
    assert f"{datetime.now():%d %b %Y}" in str(
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    )
    assert chat.render_prompt(tokenizer, "do off").startswith("01 Jan 2026 ")
    facts = chat.template_facts(tokenizer)
    assert facts is not None and facts.date == "2026-01-01"
    undated = chat.template_facts(handmade.word_tokenizer())
    assert undated is not None and undated.date == ""


def test_thinking_is_switched_off_where_the_template_can() -> None:
    tokenizer = handmade.word_tokenizer(THINKS)
    facts = chat.template_facts(tokenizer)
    assert facts is not None and facts.thinking_off
    assert chat.render_prompt(tokenizer, "do off").endswith("<think> </think> ")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (handmade.TEMPLATE, ["<end>"]),
        (handmade.TEMPLATE.replace("<end>", "so <end>"), []),  # a plain word stands first
        (handmade.BARE, []),
        (handmade.SINGLE_TURN, []),
        (handmade.TEMPLATE.replace(" <end>", "{{ eos_token }}"), ["<end>"]),
    ],
)
def test_the_token_behind_an_answer(template: str, ends: list[str]) -> None:
    tokenizer = handmade.word_tokenizer(template)
    facts = chat.template_facts(tokenizer)
    assert facts is not None and tokenizer.convert_ids_to_tokens(list(facts.ends)) == ends


def test_no_template_has_no_facts_and_a_broken_one_gives_a_sentence() -> None:
    assert chat.template_facts(handmade.word_tokenizer(None)) is None
    with pytest.raises(InputError, match="cannot render one user turn"):
        chat.template_facts(handmade.word_tokenizer("{{ raise_exception('no') }}"))


def test_the_text_of_a_token_keeps_its_blank() -> None:
    tokenizer = handmade.sentencepiece(("▁yes", "▁no"))
    before, (token,) = tokenizer("x")["input_ids"], tokenizer(" yes")["input_ids"]
    assert tokenizer.decode([token]) == "yes"  # alone it loses its blank, and " yes" is another token than "yes"
    assert chat.token_text(tokenizer, np.array(before), token) == " yes"
