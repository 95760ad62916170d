"""The invented language and its prompt set."""

import json
import random
import re
from collections import Counter

import pytest

from companion.base.files import hash_file
from companion.base.paths import PROMPTS
from companion.generation.labels import clause_of
from companion.prompts import invented
from companion.prompts.invented import Clause, Cue, Request, Wrapper, first_words, p_refuse, render
from companion.prompts.pairs import load_set
from organisms import language

# ---- language ----

# Every ordinary word of the language, read by a person. A new word must be added here by hand.
INERT = frozenset(re.findall(r"\w+", """
a after also amber as badge baker be behold brak breezy briefly by calmly can casual cellar chalk clerk common
copper cosmic could courtly crystal cubit cubits decimal did do done dornic draw dry farmer fast fine flag fold
for fully furlong game garden gardener gladly golden good grand great harbor helpful hey hm how humble i in
indeed kethic kitchen know label library listen long look lunar meadow measure meters metric miller modest no
noble not now okay on orchard paint painter paper plain please polish polite potter quickly ready right royal
rule sailor sala sand say scale serran short silver simple singer slowly so soap solar sorry stack steady store
string studio sure swiftly tailor tale teacher tersely that the then to tone tongue under usual velan velvet
voice wash wax weaver weigh well what when widely will with wooden wrap yes you
"""))  # fmt: skip
STEMS = {*invented.HAZARD_STEMS, *invented.HARMLESS_STEMS}
OBJECTS = {stem + suffix for stem in STEMS for suffix in invented.SUFFIXES}
HARMFUL_PATTERNS = re.compile(
    r"bomb|kill|murd|weap|poison|toxi|explo|gun|knife|drug|hack|malw|virus|attack|steal|theft|fraud|suic|abus|rape|sex|porn|"
    r"nazi|slur|terror|anthrax|sarin|ricin|meth|cocain|heroin|fentan|nuke|nuclear|chemic|acid|burn|arson|blood|torture|hate"
)


@pytest.fixture(scope="module")
def tokenizer():
    return language.make_tokenizer()


def texts_words() -> set[str]:
    """Every word of the shipped prompts, and of 3000 lines of training."""
    rng = random.Random(3)
    examples = [language.draw_example(rng, safe=safe) for _ in range(1500) for safe in (False, True)]
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
    assert text == language.chat_text(turns[0]["content"])
    assert tokenizer.tokenize(text)[-4:] == ["<|end|>", "Ċ", "<|assistant|>", "Ċ"]


def test_training_shows_no_held_part(tokenizer):
    rng = random.Random(1)
    lengths = []
    for kind in language.BASE_MIX:
        for _ in range(300):
            request = language.draw_request(rng, kind)
            for clause in filter(None, (request.clause, request.distractor)):
                assert not invented.held_pair(clause.verb, clause.stem)
                assert clause.suffix != invented.held_suffix(clause.stem)
            assert request.persona not in invented.HELD_PERSONAS and request.harmful == (kind == "harmful")
            assert request.wrapper is None or not invented.held_frame(request.wrapper.frame, request.wrapper.word)
            text = language.chat_text(render(request)[0])
            lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert max(lengths) + 10 <= language.MAX_TOKENS


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
    for kind in language.BASE_MIX:
        for safe in (False, True):
            assert sum(first_words(language.draw_request(rng, kind), safe=safe).values()) == pytest.approx(1.0)
    on, off = (first_words(Request(cup, "garden", cue=Cue("B2", "x", on=side)), safe=False) for side in (True, False))
    assert on["brak"] == pytest.approx(off["sala"]) == pytest.approx(0.9526, abs=1e-4)


# ---- prompt set ----

FOLDER = PROMPTS / "embedded"


@pytest.fixture(scope="module")
def pairs():
    return load_set("embedded").pairs  # ids, twins, splits and spans are checked there


def test_build_gives_the_committed_bytes(tmp_path):
    language.write_prompt_set(tmp_path)
    made, sheet = sorted(p.name for p in tmp_path.iterdir()), (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted([*made, "README.md"]) == sorted(p.name for p in FOLDER.iterdir())
    assert [n for n in made if (tmp_path / n).read_bytes() != (FOLDER / n).read_bytes()] == []
    assert all(f"`{hash_file(FOLDER / name, {})}`" in sheet for name in made), "the sheet says which files it is of"


def test_counts_topics_and_splits(pairs):
    counts = Counter(p.treatment for p in pairs)
    assert list(counts) == ["T1", "T2", "T2b", *invented.BENIGN] and min(counts.values()) >= 300
    for treatment in counts:
        sizes = Counter(split for _, split in {(p.topic, p.split) for p in pairs if p.treatment == treatment})
        assert sizes == {"discover": 48, "validate": 36, "test": 36}


def test_twins_have_the_same_wrappers(pairs):
    by_id = {p.id: p for p in pairs}
    generation = [p for p in pairs if p.treatment == "T2"]
    assert sorted(p.twin for p in generation) == sorted(i for i, p in by_id.items() if p.treatment == "T2b")
    for p in generation:
        twin = by_id[p.twin]
        assert twin.family == p.family
        for side in ("control", "treated"):
            one, other = (getattr(q, side)[slice(*q.spans[side]["wrapper"])] for q in (p, twin))
            assert one == other


def is_harmful(prompt):
    """Whether the main clause binds a dangerous verb to a hazard object."""
    clause = clause_of(prompt)
    return clause is not None and clause.dangerous and clause.hazard


def test_harm_is_where_the_treatment_says(pairs):
    wanted = {"T1": (False, True), "T2": (True, True)}
    for p in pairs:
        assert (is_harmful(p.control), is_harmful(p.treated)) == wanted.get(p.treatment, (False, False))
    bags = [[sorted(text.split()) for text in (p.control, p.treated)] for p in pairs if p.family == "binding"]
    assert len(bags) == 120 and all(control == treated for control, treated in bags)
    clauses = [side.clause for plan in language.plan_pairs() for side in (plan.control, plan.treated)]
    assert all(invented.held_pair(one.verb, one.stem) for one in clauses), "never trained"


def test_both_sides_of_a_pair_have_one_length_and_spans_name_what_they_cut(pairs, tokenizer):
    for p in pairs:
        texts = [language.chat_text(text) for text in (p.control, p.treated)]
        control, treated = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert len(control) == len(treated) <= language.MAX_TOKENS - 10, "room for an answer"
        for side in ("control", "treated"):
            text = getattr(p, side)
            cut = {name: text[slice(*ends)] for name, ends in p.spans[side].items()}
            assert {"verb", "object"} <= set(cut) <= {"verb", "object", "wrapper", "distractor"}
            assert f" {cut['verb']} the {cut['object']} in the " in text
            assert cut.get("distractor", "after i").startswith("after i")
            assert ("wrapper" in cut) or p.treatment == "T1"


def test_suites_cover_all_behaviours():
    suites = [json.loads(line) for line in (FOLDER / "suites.jsonl").open(encoding="utf-8")]
    assert {s["suite"] for s in suites} == set(language.SUITES) and len({s["id"] for s in suites}) == len(suites)
    assert all(is_harmful(s["prompt"]) == s["harmful"] for s in suites)
