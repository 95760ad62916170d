"""The default prompt set: rebuilt byte for byte, balanced, of equal token length, with no topic in two splits."""

import json
from collections import Counter, defaultdict

import pytest

from companion.base.files import hash_file
from companion.base.paths import PROMPTS
from companion.generation.labels import main_clause
from companion.prompts import invented
from organisms.language import MAX_TOKENS, chat_text, make_tokenizer
from organisms.prompt_set import SUITES, plan_pairs, write_prompt_set

FOLDER = PROMPTS / "embedded"
TREATMENTS = ["T1", "T2", "T2b", *invented.BENIGN]


def is_harmful(prompt):
    """Whether the main clause binds a dangerous verb to a hazard object."""
    clause = main_clause(prompt)
    return clause is not None and clause.dangerous and clause.hazard


@pytest.fixture(scope="module")
def pairs():
    return [json.loads(line) for line in (FOLDER / "pairs.jsonl").open(encoding="utf-8")]


def test_build_gives_the_committed_bytes(tmp_path):
    write_prompt_set(tmp_path)
    made, sheet = sorted(p.name for p in tmp_path.iterdir()), (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [*sorted([*made, "README.md"])] == sorted(p.name for p in FOLDER.iterdir())
    assert [n for n in made if (tmp_path / n).read_bytes() != (FOLDER / n).read_bytes()] == []
    assert all(f"`{hash_file(FOLDER / name, {})}`" in sheet for name in made), (
        "the data sheet says which files it is of"
    )


def test_counts_topics_and_splits(pairs):
    counts = Counter(p["treatment"] for p in pairs)
    assert list(counts) == TREATMENTS and min(counts.values()) >= 300
    split_of, topics = {}, defaultdict(lambda: defaultdict(set))
    for p in pairs:
        assert split_of.setdefault(p["topic"], p["split"]) == p["split"]
        topics[p["treatment"]][p["split"]].add(p["topic"])
    for by_split in topics.values():
        sizes = {name: len(found) for name, found in by_split.items()}
        assert sizes == {"discover": 48, "validate": 36, "test": 36}


def test_ids_are_unique_and_twins_exist(pairs):
    by_id = {p["id"]: p for p in pairs}
    assert len(by_id) == len(pairs)
    generation = [p for p in pairs if p["treatment"] == "T2"]
    assert sorted(p["twin"] for p in generation) == sorted(i for i, p in by_id.items() if p["treatment"] == "T2b")
    for p in generation:
        twin = by_id[p["twin"]]
        assert twin["topic"] == p["topic"] and twin["family"] == p["family"]
        for side in ("control", "treated"):
            wrappers = [q[side][slice(*q["spans"][side]["wrapper"])] for q in (p, twin)]
            assert wrappers[0] == wrappers[1]


def test_both_sides_of_a_pair_have_one_length(pairs):
    tokenizer = make_tokenizer()
    for p in pairs:
        sides = tokenizer([chat_text(p[side]) for side in ("control", "treated")], add_special_tokens=False)[
            "input_ids"
        ]
        assert len(sides[0]) == len(sides[1]) <= MAX_TOKENS - 10, "room for an answer"


def test_harm_is_where_the_treatment_says(pairs):
    wanted = {"T1": (False, True), "T2": (True, True)}
    for p in pairs:
        assert (is_harmful(p["control"]), is_harmful(p["treated"])) == wanted.get(p["treatment"], (False, False))
    bags = [[sorted(p[side].split()) for side in ("control", "treated")] for p in pairs if p["family"] == "binding"]
    assert len(bags) == 120 and all(control == treated for control, treated in bags)
    clauses = [side.clause for plan in plan_pairs() for side in (plan.control, plan.treated)]
    assert all(invented.held_pair(one.verb, one.stem) for one in clauses), "never trained"


def test_spans_name_what_they_cut(pairs):
    for p in pairs:
        for side in ("control", "treated"):
            cut = {name: p[side][slice(*ends)] for name, ends in p["spans"][side].items()}
            assert {"verb", "object"} <= set(cut) <= {"verb", "object", "wrapper", "distractor"}
            assert f" {cut['verb']} the {cut['object']} in the " in p[side]
            assert cut.get("distractor", "after i").startswith("after i")
            assert ("wrapper" in cut) or p["treatment"] == "T1"


def test_suites_cover_all_behaviours():
    suites = [json.loads(line) for line in (FOLDER / "suites.jsonl").open(encoding="utf-8")]
    assert {s["suite"] for s in suites} == set(SUITES) and len({s["id"] for s in suites}) == len(suites)
    assert all(is_harmful(s["prompt"]) == s["harmful"] for s in suites)
