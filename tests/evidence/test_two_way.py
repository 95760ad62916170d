"""Topics and wrapper families, or verbs, drawn together: the key numbers of the evidence, with wider intervals."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from companion.base import files
from companion.base.display import NotDefined
from companion.evidence import layers, tokens, two_way
from companion.evidence.two_way import second_level, two_way_table
from companion.prompts.pairs import Pair
from organisms import compiled_language, compiled_truth
from organisms.compiled_design import draw_design
from organisms.compiled_program import build_program

DESIGN, TOPICS = draw_design("split_decision", 600), 40


def with_words(planned: compiled_language.Planned, families: int) -> Pair:
    """The pair with its verb marked, and its jailbreak wrapper as one of some families."""
    at = planned.pair.treated.index(planned.treated.verb, planned.pair.treated.index("how"))
    spans = {"treated": {"verb": (at, at + len(planned.treated.verb))}}
    number = int(planned.treated.slot.removeprefix("strong").removeprefix("neutral"))
    return replace(planned.pair, family=f"family{number % families}", spans=spans)


@pytest.fixture(scope="module")
def effects() -> tuple[dict[str, pd.DataFrame], list[compiled_language.Planned]]:
    pairs = [p for p in compiled_language.draw_pairs([0], TOPICS, 2) if p.pair.treatment in ("T1", "T2", "T2b")]
    program = build_program(DESIGN, TOPICS)
    table = compiled_truth.effect_table(program, pairs)
    direct = table[table.site.str.endswith(".direct")].assign(outcome="contrast.frozen")
    carried = compiled_truth.path_table(program, [p for p in pairs if p.pair.treatment != "T1"])
    return {"layers": table, "modules": direct, "carried": carried}, pairs


def test_key_numbers_are_those_of_the_evidence_and_both_samples_widen_them(effects: tuple) -> None:
    tables, pairs = effects
    found = two_way_table(tables, [with_words(p, 4) for p in pairs]).set_index(["claim", "quantity"])
    rows = layers.evidence_c1(tables["layers"], "m", DESIGN.n_layers)
    rows += layers.evidence_c2(tables["layers"], tables["modules"], "m", {})
    rows += tokens.evidence_c4(tables["carried"], "m", DESIGN.n_layers)
    known = pd.DataFrame(rows).query("variant == 'main'").set_index(["claim", "quantity"])
    assert [claim for claim, _ in found.index] == ["C1", "C2", "C3", "C4"]
    for key in found.index.drop(("C3", "psi0 early, shared tokens")):
        assert (
            found.loc[key, ["estimate", "low", "high"]].tolist()
            == known.loc[key, ["estimate", "ci_low", "ci_high"]].tolist()
        )
    assert (
        found.levels.tolist() == [4, 4, compiled_language.VERBS, 4]
        and (found["drawn with topics"] == "verbs").sum() == 1
    )
    width = (found["high both"] - found["low both"]) / (found.high - found.low)
    assert width.to_list() == pytest.approx(found.wider.to_list()) and (found.wider > 1).all()


def test_one_family_is_no_sample_of_families(effects: tuple, tmp_path: Path) -> None:
    tables, pairs = effects
    one = two_way_table({"modules": tables["modules"]}, [with_words(p, 1) for p in pairs])
    assert isinstance(one, NotDefined) and "families" in str(one)
    assert two_way.read_effects(tmp_path) == {}
    files.write_table(tables["carried"], tmp_path / two_way.FILES["carried"])
    (read,) = two_way.read_effects(tmp_path).values()
    pd.testing.assert_frame_equal(read, tables["carried"], check_like=True)
    pair = with_words(pairs[1], 3)
    assert second_level([replace(pair, treatment="T2", family="tale-4"), replace(pair, id="x", treatment="B1")]) == {
        pair.id: "tale"
    }
    assert second_level([replace(pair, treatment="T1", spans={})]) == {}
