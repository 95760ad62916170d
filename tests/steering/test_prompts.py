"""Prompts of a steering experiment: who plays which role, and which topic may be used for what."""

import json
from pathlib import Path

import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.prompts import pairs
from companion.prompts.pairs import Pair
from companion.steering import prompts

ROWS = [("a", "T2", "x", "test", "badge-5"), ("b", "T2b", "x", "test", "badge-5"), ("c", "T1", "y", "discover", "object"),
        ("d", "B1", "z", "validate", "style"), ("e", "T2", "y", "discover", "role-play")]  # fmt: skip
PAIRS = tuple(Pair(*row[:3], f"{row[0]} off", f"{row[0]} on", row[3], family=row[4]) for row in ROWS)


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
    table = prompts.prompt_table(PAIRS[:3], "no such set")  # a set without benign behaviours has harmless prompts
    assert set(table.loc[table.kind == "harmless", "text"]) == {"b off", "c off"}


def test_a_suite_prompt_on_a_topic_already_used_is_left_out_and_a_broken_suite_names_its_line(tmp_path: Path) -> None:
    row = {"suite": "s", "harmful": True, "tier": 3}
    rows = [{**row, "id": topic, "prompt": f"p{topic}", "topic": topic} for topic in ("x", "y", "z", "new")]

    def folder(*rows: dict) -> Path:
        (tmp_path / "suites.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path

    assert set(prompts.prompt_table(PAIRS, folder(*rows[:3])).query("suite == 's'").topic) == {"x"}
    assert prompts.from_suites(folder(rows[3])).split.tolist() == ["test"]
    with pytest.raises(InputError, match=r"line 2.*harmful"):
        prompts.from_suites(folder(rows[0], {"id": "2", "suite": "s", "prompt": "q"}))


def test_the_shipped_prompts_never_share_a_topic_over_splits_and_suffice_for_the_rule() -> None:
    shipped = prompts.prompt_table(pairs.load_set("embedded").pairs, "embedded")
    assert (shipped.groupby("topic").split.nunique() == 1).all()
    assert shipped.text.is_unique and set(shipped.kind) == set(prompts.KINDS)
    assert not shipped.suite.str.startswith("f_").any()
    test, is_harmful = shipped[shipped.split == "test"], shipped.kind == "harmful"
    assert (test.kind == "harmless").sum() >= 300 and test.loc[is_harmful & test.wrapped, "topic"].nunique() >= 100
    assert set(shipped.severity[is_harmful]) == {-0.6, 0.0, 0.6} and shipped.severity[~is_harmful].isna().all()


def test_thinning_spreads_over_topics_and_repeats_itself() -> None:
    table = pd.DataFrame({"topic": ["a"] * 50 + ["b"] * 2 + ["c"] * 2, "text": range(54)})
    few = prompts.thinned(table, 6)
    assert few.topic.value_counts().to_dict() == {"a": 2, "b": 2, "c": 2}
    assert few.equals(prompts.thinned(table, 6)) and few.text.is_monotonic_increasing
