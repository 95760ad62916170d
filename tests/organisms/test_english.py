"""The plain-English set: rebuilt byte for byte, split by topic and verb, apart from the training, of allowed words only."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from companion.base.files import hash_file
from companion.base.paths import PROMPTS
from companion.prompts.pairs import load_set
from organisms import english, refuser

ALLOWED = Path(__file__).with_name("english_words.txt")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-zéû][a-zéû'-]*", text.lower()))


# Words that qualify an object of either kind and are no object themselves, and words that are not content.
NO_CONTENT = words(
    "fake false stolen illegal old new small rich rival rival's private used short high lonely medical wooden stranger's man's "
    "elderly summer local hidden former fresh "
    "a an the my his her of for in on at to with from by and or off out up not is are that about without before after into onto "
    "over under as one i some being him"
)


@pytest.fixture(scope="module")
def pairs():
    return load_set("english").pairs  # ids, twins and splits are checked there


def test_build_gives_the_committed_bytes(tmp_path):
    weak = "english-weak-wrappers"
    for folder, rows in ((PROMPTS / "english", english.pair_rows()), (PROMPTS / weak, english.wrapped_rows(weak))):
        english.write_english(tmp_path, rows)
        sheet = (folder / "README.md").read_text(encoding="utf-8")
        for name in ("pairs.jsonl", "outcome.json"):
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
            assert f"`{hash_file(folder / name, {})}`" in sheet, "the data sheet says which files it is of"


def test_topics_and_verbs_belong_to_one_split():
    every = english.topics()
    assert len({topic.name for topic in every}) == len(every) >= 120
    of_verbs = {(topic.harmful[0], topic.split) for topic in every}
    assert len(of_verbs) == len(dict(of_verbs))
    assert Counter(topic.split for topic in every) == {"discover": 48, "validate": 36, "test": 36}
    assert {topic.family for topic in every} == {"verb", "object", "look-alike"}
    assert all((topic.harmful[0] == topic.twin[0]) == (topic.family != "verb") for topic in every)


def test_kinds_of_pairs(pairs):
    families = defaultdict(set)
    for pair in pairs:
        families[pair.treatment].add(pair.family)
    wrappers = english.wrappers("english")
    assert len(wrappers) >= 6 and families["T2"] == families["T2b"] == set(wrappers)
    assert sum(name.startswith("B") for name in families) >= 6
    by_id = {pair.id: pair for pair in pairs}
    assert all(by_id[pair.twin].family == pair.family for pair in pairs if pair.treatment == "T2")
    for pair in pairs:
        named = {name: pair.treated[slice(*ends)] for name, ends in pair.spans["treated"].items()}
        assert named["verb"] and named["object"] and (pair.treatment == "T1" or named["wrapper"])


def test_training_shares_no_verb_and_no_object_with_the_study():
    studied = words(" ".join(text for t in english.topics() for text in t.harmful + t.twin)) - NO_CONTENT
    rows = [row for row in english.read_words("training") if row["family"] != "general"]
    assert len(rows) > 500 and not words(" ".join(row["text"] for row in rows)) & studied
    wrapped = [row["jailbreak"] for row in english.read_words("wrappers")]
    texts = {row["text"] for row in english.read_words("training")} | set(refuser.PHRASINGS)
    assert not [(form, text) for form in wrapped for text in texts if form.replace("{}", "").strip() in text]


def test_every_content_word_is_allowed():
    """A word that is new in the set has to be read by somebody: everyday wrongdoing, nothing sexual, no mass harm."""
    texts = [*english.PHRASINGS, *refuser.PHRASINGS, *refuser.REFUSALS]
    texts += [text for topic in english.topics() for text in topic.harmful + topic.twin]
    texts += [row["text"] for row in english.read_words("training")]
    texts += [form for row in english.read_words("wrappers") for form in (row["neutral"], row["jailbreak"])]
    texts += [form for _, off, on, _ in english.BENIGN.values() for form in (off, on)]
    assert words("\n".join(texts)) == set(ALLOWED.read_text(encoding="utf-8").split())
