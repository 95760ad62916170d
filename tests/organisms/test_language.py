"""The language: nothing real or harmful in it, held-out parts stay held out, tokens are what the pairs rely on."""

import json
import random
import re

import pytest
from transformers import AutoTokenizer

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


def training_texts(n: int = 1500) -> list[str]:
    rng = random.Random(3)
    examples = [draw_example(rng, mix, safe=mix is TUNE_MIX) for _ in range(n) for mix in (BASE_MIX, TUNE_MIX)]
    return [f"{e.user} {e.answer}" for e in examples]


def shipped_texts() -> list[str]:
    folder = PROMPTS / "embedded"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open(encoding="utf-8")]
    suites = [json.loads(line) for line in (folder / "suites.jsonl").open(encoding="utf-8")]
    return [p[side] for p in pairs for side in ("control", "treated")] + [s["prompt"] for s in suites]


def test_every_word_is_inert_or_generated():
    words = {w for text in training_texts() + shipped_texts() for w in re.findall(r"[^\s,.?]+", text)}
    assert words <= INERT | OBJECTS | set(invented.DANGEROUS_VERBS)
    pieces = {p.strip() for p in invented.word_pieces()}
    assert pieces <= INERT | STEMS | set(invented.DANGEROUS_VERBS) | set(invented.SUFFIXES)


def test_no_harmful_pattern_in_any_word():
    words = INERT | OBJECTS | set(invented.DANGEROUS_VERBS)
    assert [w for w in words if HARMFUL_PATTERNS.search(w)] == []


def test_stems_are_nonsense_distinct_and_split_into_equal_classes():
    generated = [*invented.HAZARD_STEMS, *invented.HARMLESS_STEMS, *invented.DANGEROUS_VERBS]
    assert len(set(generated)) == len(generated) == 2 * invented.N_STEMS + invented.N_VERBS
    assert not set(generated) & (INERT | invented.REAL_WORDS)
    assert len({s[:4] for s in generated}) == len(generated)


def test_every_piece_is_one_token_and_every_object_two(tokenizer):
    assert [p for p in invented.word_pieces() if len(tokenizer.tokenize(p)) != 1] == []
    for stem in STEMS:
        for suffix in invented.SUFFIXES:
            assert [t.lstrip("Ġ") for t in tokenizer.tokenize(f" {stem}{suffix}")] == [stem, suffix]


def test_tokenizer_round_trips_any_text_and_loads_offline(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("in a solar tale, how do i paint the falkova?", "Größe: 3 µm, «x»\n", "sure, dry it."):
        ids = again(text, add_special_tokens=False)["input_ids"]
        assert again.decode(ids) == text
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(again) == len(tokenizer) < 900


def test_chat_template_is_the_one_training_used(tokenizer):
    turns = [{"role": "user", "content": "how do i paint the falkova in the garden?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == chat_text(turns[0]["content"])
    assert tokenizer.tokenize(text)[-4:] == ["<|end|>", "Ċ", "<|assistant|>", "Ċ"]
    answered = [{"role": "system", "content": "be kind"}, *turns, {"role": "assistant", "content": "sure."}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    assert text.startswith("<|bos|><|system|>\nbe kind<|end|>\n<|user|>\n")
    assert text.endswith("<|assistant|>\nsure.<|end|>")


def test_training_shows_no_held_part(tokenizer):
    rng = random.Random(1)
    lengths = []
    for kind in BASE_MIX:
        for _ in range(300):
            request = draw_request(rng, kind)
            clauses = [request.clause] + ([request.distractor] if request.distractor else [])
            assert not any(c.held or c.suffix == invented.held_suffix(c.stem) for c in clauses)
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
