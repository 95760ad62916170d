"""What chat templates do with the date, thinking, and the end of an answer; and the text of a token."""

from datetime import datetime

import handmade
import numpy as np
import pytest

from companion.base import chat
from companion.base.errors import InputError

DATED = "{{ strftime_now('%d %b %Y') }} " + handmade.TEMPLATE
LLAMA = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}{{ d }} " + handmade.TEMPLATE
THINKS = handmade.TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}"


@pytest.mark.parametrize("template", [DATED, LLAMA])
def test_a_prompt_is_the_same_on_every_day_and_the_day_is_said(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.2 and Granite print the date: tables changed daily, and notebooks on either side of midnight disagreed."""
    tokenizer = handmade.word_tokenizer(template)
    plain = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert f"{datetime.now():%d %b %Y}" in str(plain)
    assert chat.render_prompt(tokenizer, "do off").startswith("01 Jan 2026 ")
    assert chat.template_facts(tokenizer).date == "2026-01-01"
    assert chat.template_facts(handmade.word_tokenizer()).date == ""


def test_thinking_is_switched_off_where_the_template_can() -> None:
    tokenizer = handmade.word_tokenizer(THINKS)
    assert chat.template_facts(tokenizer).thinking_off
    assert chat.render_prompt(tokenizer, "do off").endswith("<think> </think> ")


ENDS = [
    (handmade.TEMPLATE, ["<end>"]), (handmade.TEMPLATE.replace(" <end>", "{{ eos_token }}"), ["<end>"]),
    (handmade.TEMPLATE.replace("<end>", "so <end>"), []),  # a plain word stands first
    (handmade.BARE, []), (handmade.SINGLE_TURN, []),
]  # fmt: skip


def test_the_token_behind_an_answer_where_there_is_one() -> None:
    for template, ends in ENDS:
        tokenizer = handmade.word_tokenizer(template)
        assert tokenizer.convert_ids_to_tokens(list(chat.template_facts(tokenizer).ends)) == ends
    assert chat.template_facts(handmade.word_tokenizer(None)) is None
    with pytest.raises(InputError, match="cannot render one user turn"):
        chat.template_facts(handmade.word_tokenizer("{{ raise_exception('no') }}"))


def test_the_text_of_a_token_keeps_its_blank() -> None:
    tokenizer = handmade.sentencepiece(("▁yes", "▁no"))
    before, (token,) = tokenizer("x")["input_ids"], tokenizer(" yes")["input_ids"]
    assert tokenizer.decode([token]) == "yes"  # alone it loses its blank, and " yes" is another token than "yes"
    assert chat.token_text(tokenizer, np.array(before), token) == " yes"
