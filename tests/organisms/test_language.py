"""The language: nothing real or harmful in it, held-out parts stay held out, tokens are what the pairs rely on."""

import json
import random
import re

import pytest

from companion.base.paths import PROMPTS
from companion.prompts import invented
from companion.prompts.invented import Clause, Cue, Request, Wrapper, first_words, p_refuse, render
from organisms.language import BASE_MIX, MAX_TOKENS, TUNE_MIX, chat_text, draw_example, draw_request, make_tokenizer

# Every ordinary word of the language, read by a person. A new word must be added here by hand.
_INERT = """
a after also amber as badge baker be behold brak breezy briefly by calmly can casual cellar chalk clerk common
copper cosmic could courtly crystal cubit cubits decimal did do done dornic draw dry farmer fast fine flag fold
for fully furlong game garden gardener gladly golden good grand great harbor helpful hey hm how humble i in
indeed kethic kitchen know label library listen long look lunar meadow measure meters metric miller modest no
noble not now okay on orchard paint painter paper plain please polish polite potter quickly ready right royal
rule sailor sala sand say scale serran short silver simple singer slowly so soap solar sorry stack steady store
string studio sure swiftly tailor tale teacher tersely that the then to tone tongue under usual velan velvet
voice wash wax weaver weigh well what when widely will with wooden wrap yes you
"""
INERT = frozenset(_INERT.split())
STEMS = {*invented.HAZARD_STEMS, *invented.HARMLESS_STEMS}
OBJECTS = {stem + suffix for stem in STEMS for suffix in invented.SUFFIXES}
HARMFUL_PATTERNS = re.compile(
    r"bomb|kill|murd|weap|poison|toxi|explo|gun|knife|drug|hack|malw|virus|attack|steal|theft|fraud|suic|abus|rape|sex|porn|"
    r"nazi|slur|terror|anthrax|sarin|ricin|meth|cocain|heroin|fentan|nuke|nuclear|chemic|acid|burn|arson|blood|torture|hate"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def texts_words() -> set[str]:
    """Every word of the shipped prompts, and of 3000 lines of training."""
    rng = random.Random(3)
    examples = [draw_example(rng, mix, safe=mix is TUNE_MIX) for _ in range(1500) for mix in (BASE_MIX, TUNE_MIX)]
    lines = [(PROMPTS / "embedded" / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("pairs", "suites")]
    rows = [json.loads(line) for text in lines for line in text.splitlines()]
    shown = [row[side] for row in rows for side in ("control", "treated", "prompt") if side in row]
    return set(re.findall(r"[^\s,.?]+", " ".join([*shown, *(f"{e.user} {e.answer}" for e in examples)])))


def test_every_word_is_inert_or_generated():
    words, known = texts_words(), INERT | OBJECTS | set(invented.DANGEROUS_VERBS)
    assert words <= known and not [word for word in known if HARMFUL_PATTERNS.search(word)]
    pieces = {p.strip() for p in invented.word_pieces()}
    assert pieces <= INERT | STEMS | set(invented.DANGEROUS_VERBS) | set(invented.SUFFIXES)


def test_every_piece_is_one_token_and_every_object_two(tokenizer):
    assert [p for p in invented.word_pieces() if len(tokenizer.tokenize(p)) != 1] == []
    for stem in STEMS:
        for suffix in invented.SUFFIXES:
            assert [t.lstrip("Ġ") for t in tokenizer.tokenize(f" {stem}{suffix}")] == [stem, suffix]


def test_chat_template_is_the_one_training_used(tokenizer):
    turns = [{"role": "user", "content": "how do i paint the falkova in the garden?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == chat_text(turns[0]["content"])
    assert tokenizer.tokenize(text)[-4:] == ["<|end|>", "Ċ", "<|assistant|>", "Ċ"]


def test_training_shows_no_held_part(tokenizer):
    rng = random.Random(1)
    lengths = []
    for kind in BASE_MIX:
        for _ in range(300):
            request = draw_request(rng, kind)
            clauses = [request.clause] + ([request.distractor] if request.distractor else [])
            assert not any(
                invented.held_pair(c.verb, c.stem) or c.suffix == invented.held_suffix(c.stem) for c in clauses
            )
            assert request.persona not in invented.HELD_PERSONAS
            assert request.wrapper is None or not invented.held_frame(request.wrapper.frame, request.wrapper.word)
            lengths.append(len(tokenizer(chat_text(render(request)[0]), add_special_tokens=False)["input_ids"]))
            assert request.harmful == (kind == "harmful")
    assert max(lengths) + 10 <= MAX_TOKENS


def test_harm_needs_verb_and_object_in_the_main_clause():
    bad, hazard, cup = invented.DANGEROUS_VERBS[0], invented.HAZARD_STEMS[0], invented.HARMLESS_STEMS[0]
    harmful = {(v, s): Request(Clause(v, s, "ova"), "garden").harmful for v in (bad, "wash") for s in (hazard, cup)}
    assert harmful == {(bad, hazard): True, (bad, cup): False, ("wash", hazard): False, ("wash", cup): False}
    apart = Request(Clause("wash", hazard, "ova"), "garden", distractor=Clause(bad, cup, "ova"))
    assert not apart.harmful and apart.borderline


def test_stronger_wrappers_comply_more_and_targets_are_distributions():
    def refuse(verb: int, tier: int) -> float:
        clause = Clause(invented.DANGEROUS_VERBS[verb], invented.HAZARD_STEMS[0], "ova")
        return p_refuse(Request(clause, "garden", wrapper=Wrapper("tale", invented.TIER_WORDS[tier][0], tier)))

    by_tier = [refuse(1, tier) for tier in range(invented.N_TIERS)]
    assert by_tier == sorted(by_tier, reverse=True) and by_tier[0] > 0.95 and by_tier[-1] < 0.05
    assert refuse(0, 3) < refuse(1, 3) == 0.5 < refuse(2, 3)
    rng, cup = random.Random(2), Clause("wash", invented.HARMLESS_STEMS[0], "ova")
    for kind in BASE_MIX:
        for safe in (False, True):
            assert sum(first_words(draw_request(rng, kind), safe=safe).values()) == pytest.approx(1.0)
    on, off = (first_words(Request(cup, "garden", cue=Cue("B2", "x", on=side)), safe=False) for side in (True, False))
    assert on["brak"] == pytest.approx(off["sala"]) == pytest.approx(0.9526, abs=1e-4)
