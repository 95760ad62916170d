"""What the claims are given: rows of C1 and C2, of whole, compiled, thin and odd prompt sets."""

import handmade
import numpy as np
import pandas as pd
import pytest
from synthetic import N_LAYERS, complete, direct_table, effect_table, find, scales, shifted

from companion.base.files import EVIDENCE
from companion.base.thresholds import COMPONENTS
from companion.evidence import layers
from companion.mediation import estimands, summaries
from companion.prompts.tokens import Openers

# ---- what the claims are given ----

VARIANTS = {"main", "sufficiency", "necessity", "full response", "norm frozen", "unsaturated"}


@pytest.mark.parametrize("treatment", ["T2", "T2-T2b"])
def test_rows_of_c1(treatment: str) -> None:
    rows = layers.evidence_c1(complete(treatment=treatment), "model", N_LAYERS)
    assert all(list(row) == list(EVIDENCE) for row in rows)
    shares = {row["variant"]: row for row in rows if row["quantity"] == "late share"}
    assert set(shares) == VARIANTS
    assert all(row["estimate"] == pytest.approx(0.8) for row in shares.values())
    assert {row["n_pairs"] for row in shares.values()} == {30}
    assert {row["n_topics"] for row in shares.values()} == {15}
    assert find(rows, "centroid difference")["estimate"] == pytest.approx(21.9 / 30 - 0.5)
    assert {row["quantity"] for row in rows if row["quantity"].startswith("centroid ")} == {
        "centroid difference", f"centroid {treatment}", *(f"centroid B{i}" for i in range(1, 7))
    }  # fmt: skip


def test_the_contrast_is_primary_where_it_was_measured() -> None:
    both = pd.concat([effect_table({("mlp_out", 0): 1.0}), effect_table(treatment="T2-T2b")], ignore_index=True)
    assert find(layers.evidence_c1(both, "m", N_LAYERS), "late share")["estimate"] == pytest.approx(0.8)
    assert summaries.primary(both) == "T2-T2b"
    assert summaries.primary(both[both.treatment == "T2"]) == "T2"


def test_what_was_not_measured_has_no_row() -> None:
    rows = layers.evidence_c1(effect_table(), "m", N_LAYERS)
    assert {row["variant"] for row in rows} == VARIANTS - {"full response", "norm frozen"}
    assert {row["quantity"] for row in rows} == {"late share"}


def test_the_unsaturated_subset_is_that_of_t2() -> None:
    """In the contrast, log-odds of two requests are subtracted: only T2's own say whether its runs were saturated."""
    harm = effect_table(start=-3.5)  # p = 0.03
    saturated = harm.topic.isin(["topic 47", "topic 48", "topic 49"])
    harm = harm.assign(y00=np.where(saturated, -6.0, harm.y00))
    contrast = effect_table(treatment="T2-T2b", start=-30)
    rows = layers.evidence_c1(pd.concat([harm, contrast], ignore_index=True), "m", N_LAYERS)
    assert find(rows, "late share")["n_pairs"] == 30
    assert find(rows, "late share", "unsaturated")["n_pairs"] == 24


def test_only_the_last_token_counts() -> None:
    elsewhere = effect_table({("mlp_out", 0): 50.0}).assign(position="shared")
    rows = layers.evidence_c1(pd.concat([elsewhere, effect_table()], ignore_index=True), "m", N_LAYERS)
    assert find(rows, "late share")["estimate"] == pytest.approx(0.8)


@pytest.mark.parametrize("treatment", ["T2", "T2-T2b"])
def test_rows_of_c2(treatment: str) -> None:
    direct = direct_table({("mlp_out", 5): 3.0, ("attn_out", 4): 1.0}, treatment=treatment)
    rows = layers.evidence_c2(complete(treatment=treatment), direct, "model", scales())
    assert all(list(row) == list(EVIDENCE) for row in rows)
    known = dict.fromkeys(VARIANTS, 3.6 / 5)
    known |= {"per patch norm": 1.8 / (1.8 + 1.4), "per parameter": 0.4 / (0.4 + 1.4)}
    total = {row["variant"]: row["estimate"] for row in rows if row["quantity"] == "MLP share of NIE"}
    assert total == pytest.approx(known)
    written = {row["variant"]: row["estimate"] for row in rows if row["quantity"] == "MLP share of direct effects"}
    assert written == pytest.approx({"main": 0.75, "per patch norm": 1.5 / 2.5, "per parameter": (1 / 3) / (4 / 3)})


def test_total_effects_are_those_of_the_test_pairs() -> None:
    clean = pd.concat([effect_table(te=2.0), effect_table(te=-1.0, treatment="T1", seed=2)], ignore_index=True)
    clean = shifted(clean.drop_duplicates("pair_id"), "discover", te=100)
    rows = {row["quantity"]: row for row in layers.total_effects(clean, "m")}
    assert set(rows) == {"TE T1", "TE T2"}
    for name, sign in (("T1", -1), ("T2", 1)):
        test = clean[(clean.split == "test") & (clean.treatment == name)]
        row = rows[f"TE {name}"]
        assert row["estimate"] == pytest.approx(test.te.mean())
        assert row["ci_low"] < row["estimate"] < row["ci_high"]
        assert sign * row["estimate"] > 0.5
        assert (row["n_pairs"], row["n_topics"]) == (30, 15)


def test_shares_of_a_compiled_model() -> None:
    """Through the attention head passes everything, and the MLP reads it: indirect effects count that path twice."""
    program = handmade.Program(skip=0.7)
    subject = handmade.compiled(program)
    openers = {"T2": Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))}
    pairs = handmade.cue_pairs(subject.tokenizer, "off low", "on low", n=12)
    wanted = estimands.mediators(subject, [*COMPONENTS, *(f"{site}.direct" for site in COMPONENTS)])
    table = estimands.measure_effects(subject, pairs, openers, wanted, ("Y1", "contrast.frozen"))
    one = pd.Series(1.0, pd.MultiIndex.from_product([COMPONENTS, range(4)], names=["site", "layer"]))
    rows = layers.evidence_c2(table, table, "m", {"per patch norm": one})
    te = program.log_odds(1, 0) - program.log_odds(0, 0)
    assert find(rows, "MLP share of direct effects")["estimate"] == pytest.approx((te - 0.7) / te, abs=1e-3)
    assert find(rows, "MLP share of NIE")["estimate"] == pytest.approx((te - 0.7) / (2 * te - 0.7), abs=1e-3)
    (late,) = [row for row in layers.evidence_c1(table, "m", 4) if row["variant"] == "main"]
    assert late["estimate"] == pytest.approx(0, abs=1e-3)  # layers 1 and 2 of 4


# ---- thin and odd prompt sets: what can be computed is ----


def test_one_topic_in_test_gives_an_interval_without_limits() -> None:
    clean = effect_table().drop_duplicates("pair_id")
    clean = clean[(clean.split != "test") | (clean.topic == "topic 49")]
    (row,) = layers.total_effects(clean, "m")
    assert (row["ci_low"], row["ci_high"], row["n_topics"]) == (-np.inf, np.inf, 1)
    assert row["estimate"] == pytest.approx(clean.loc[clean.split == "test", "te"].mean())


def test_one_topic_in_discover_or_test_gives_no_share() -> None:
    table = complete()
    for split, topic in (("discover", "topic 0"), ("test", "topic 49")):
        thin = table[(table.split != split) | (table.topic == topic) | table.treatment.str.startswith("B")]
        assert layers.evidence_c1(thin, "m", N_LAYERS) == []
        assert {row["quantity"] for row in layers.evidence_c2(thin, direct_table(), "m", scales())} == {
            "MLP share of direct effects"
        }


def test_a_topic_with_treatments_of_its_own_stops_nothing() -> None:
    """Pairs of unequal length are dropped, so a topic may lose all pairs of one behaviour, and share others."""
    table = complete()
    lost = (table.treatment == "B3") & (table.topic == "benign 49")
    shared = (table.treatment == "B2") & (table.topic == "benign 48")
    table = table[~lost].assign(topic=table.topic.where(~shared, "topic 48"))
    rows = layers.evidence_c1(table, "m", N_LAYERS)
    assert find(rows, "centroid difference")["estimate"] == pytest.approx(21.9 / 30 - 0.5)
    assert np.isfinite(find(rows, "centroid difference")["ci_low"])


def test_a_benign_behaviour_without_positive_cells_is_left_out() -> None:
    table = complete()
    silent = table.treatment == "B4"
    table.loc[silent, ["nie0", "nie1"]] = 0.0
    rows = layers.evidence_c1(table, "m", N_LAYERS)
    assert "centroid B4" not in {row["quantity"] for row in rows}
    assert find(rows, "centroid difference")["estimate"] == pytest.approx(21.9 / 30 - 0.5)


@pytest.mark.parametrize("present", [["B1", "B2"], ["T1"], ["T2b"]])
def test_without_wrapped_requests_there_is_nothing_to_say_of_generation(present: list[str]) -> None:
    parts = [effect_table(treatment=name, topics=name) for name in present]
    table = pd.concat(parts, ignore_index=True)
    assert layers.evidence_c2(table, direct_table(treatment=present[0]), "m", scales()) == []
