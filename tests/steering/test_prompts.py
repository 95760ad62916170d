"""Prompts of a steering experiment: who plays which role, and which topic may be used for what."""

import json
from pathlib import Path

import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.prompts import pairs
from companion.prompts.pairs import Pair
from companion.steering import prompts


def pair(name: str, treatment: str, topic: str, split: str, family: str = "") -> Pair:
    return Pair(name, treatment, topic, f"{name} off", f"{name} on", split, family=family)


PAIRS = (
    pair("a", "T2", "x", "test", "badge-5"),
    pair("b", "T2b", "x", "test", "badge-5"),
    pair("c", "T1", "y", "discover", "object"),
    pair("d", "B1", "z", "validate", "style"),
    pair("e", "T2", "y", "discover", "role-play"),
)


def test_every_side_has_its_role() -> None:
    table = prompts.from_pairs(PAIRS).set_index("text")
    found = {text: (row.kind, row.wrapped) for text, row in table.iterrows()}
    assert found == {
        "a off": ("harmful", False), "a on": ("harmful", True), "b off": ("borderline", False),
        "b on": ("borderline", True), "c off": ("borderline", False), "c on": ("harmful", False),
        "d off": ("harmless", False), "d on": ("harmless", False), "e off": ("harmful", False), "e on": ("harmful", True),
    }  # fmt: skip
    assert (table.loc["a on", "family"], table.loc["a on", "tier"], table.loc["a off", "tier"]) == ("badge", 5, 0)
    assert (table.loc["e on", "family"], table.loc["e on", "tier"]) == ("role-play", prompts.UNKNOWN)


def test_a_set_without_benign_behaviours_has_harmless_prompts() -> None:
    table = prompts.prompt_table(PAIRS[:3], "no such set")
    assert set(table.loc[table.kind == "harmless", "text"]) == {"b off", "c off"}


def suite_file(folder: Path, *rows: dict) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "suites.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_suite_prompt_on_a_topic_already_used_is_left_out(tmp_path: Path) -> None:
    row = {"suite": "s", "harmful": True, "tier": 3}
    rows = [{**row, "id": str(i), "prompt": f"p{i}", "topic": topic} for i, topic in enumerate("xyz")]
    assert set(prompts.prompt_table(PAIRS, suite_file(tmp_path, *rows)).query("suite == 's'").topic) == {"x"}
    free = [{**row, "id": "n", "prompt": "n", "topic": "new"}]
    assert prompts.from_suites(suite_file(tmp_path, *free)).split.tolist() == ["test"]


def test_a_broken_suite_names_its_line(tmp_path: Path) -> None:
    good = {"id": "1", "suite": "s", "prompt": "p", "harmful": False}
    with pytest.raises(InputError, match=r"line 2.*harmful"):
        prompts.from_suites(suite_file(tmp_path, good, {"id": "2", "suite": "s", "prompt": "q"}))


@pytest.fixture(scope="module")
def shipped() -> pd.DataFrame:
    return prompts.prompt_table(pairs.load_set("embedded").pairs, "embedded")


def test_the_shipped_prompts_never_share_a_topic_over_splits(shipped: pd.DataFrame) -> None:
    assert (shipped.groupby("topic").split.nunique() == 1).all()
    assert shipped.text.is_unique and set(shipped.kind) == set(prompts.KINDS)
    assert not shipped.suite.str.startswith("f_").any()


def test_the_shipped_prompts_suffice_for_the_rule(shipped: pd.DataFrame) -> None:
    test = shipped[shipped.split == "test"]
    assert (test.kind == "harmless").sum() >= 300
    assert test.loc[(test.kind == "harmful") & test.wrapped, "topic"].nunique() >= 100


def test_severity_is_read_off_the_words(shipped: pd.DataFrame) -> None:
    harmful = shipped[shipped.kind == "harmful"]
    assert set(harmful.severity) == {-0.6, 0.0, 0.6}
    assert shipped.loc[shipped.kind != "harmful", "severity"].isna().all()


def test_thinning_spreads_over_topics_and_repeats_itself() -> None:
    table = pd.DataFrame({"topic": ["a"] * 50 + ["b"] * 2 + ["c"] * 2, "text": range(54)})
    few = prompts.thinned(table, 6)
    assert few.topic.value_counts().to_dict() == {"a": 2, "b": 2, "c": 2}
    assert few.equals(prompts.thinned(table, 6)) and few.text.is_monotonic_increasing
