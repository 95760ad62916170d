"""Evidence of C1 to C3 from tables with known shares and compiled models, and with two samples drawn together."""

import re
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pandas as pd
import pytest
import torch
from models import Program, compiled, random_pairs, tiny_subject
from oracles import said
from rows import N_LAYERS, benign_tables, complete, direct_table, effect_table, find, scales, shifted
from sklearn.metrics import roc_auc_score

from companion.base import files
from companion.base.display import NotDefined
from companion.base.files import EVIDENCE
from companion.evidence import layers, tokens
from companion.evidence.layers import second_level, two_way_table
from companion.mediation import estimands
from companion.model import activations
from companion.model.architecture import Subject
from companion.prompts.pairs import Pair
from companion.prompts.tokens import TokenPair, token_pair
from organisms import compiled_language, compiled_truth
from organisms.compiled_design import draw_design
from organisms.compiled_program import build_program

# ---- layers ----

VARIANTS = {"main", "sufficiency", "necessity", "full response", "norm frozen", "unsaturated"}


@pytest.mark.parametrize("treatment", ["T2", "T2-T2b"])
def test_rows_of_c1(treatment: str) -> None:
    rows = layers.evidence_c1(complete(treatment=treatment), "model", N_LAYERS)
    assert all(list(row) == list(EVIDENCE) for row in rows)
    found = pd.DataFrame(rows).set_index("quantity")
    shares = found.loc["late share"]
    assert set(shares.variant) == VARIANTS and shares.estimate.tolist() == pytest.approx([0.8] * len(VARIANTS))
    assert set(zip(shares.n_pairs, shares.n_topics, strict=True)) == {(30, 15)}
    assert found.estimate["centroid difference"] == pytest.approx(21.9 / 30 - 0.5)
    names = {"late share", "centroid difference", f"centroid {treatment}", *(f"centroid B{i}" for i in range(1, 7))}
    assert set(found.index) == names


def test_the_contrast_is_read_where_it_was_measured_and_the_last_token_alone() -> None:
    elsewhere = effect_table({("mlp_out", 0): 50.0}, treatment="T2-T2b").assign(position="shared")
    both = pd.concat([effect_table({("mlp_out", 0): 1.0}), effect_table(treatment="T2-T2b"), elsewhere])
    rows = layers.evidence_c1(both.reset_index(drop=True), "m", N_LAYERS)
    assert find(rows, "late share")["estimate"] == pytest.approx(0.8)
    known = {("late share", one) for one in VARIANTS - {"full response", "norm frozen"}}
    assert {(row["quantity"], row["variant"]) for row in rows} == known, "what was not measured has no row"


def test_the_unsaturated_subset_is_that_of_t2() -> None:
    """In the contrast, log-odds of two requests are subtracted: only T2's own say whether its runs were saturated."""
    harm = effect_table(start=-3.5)  # p = 0.03
    harm = harm.assign(y00=harm.y00.mask(harm.topic.isin(["topic 47", "topic 48", "topic 49"]), -6.0))
    contrast = effect_table(treatment="T2-T2b", start=-30)
    rows = layers.evidence_c1(pd.concat([harm, contrast], ignore_index=True), "m", N_LAYERS)
    assert find(rows, "late share")["n_pairs"] == 30 and find(rows, "late share", "unsaturated")["n_pairs"] == 24


@pytest.mark.parametrize("treatment", ["T2", "T2-T2b"])
def test_rows_of_c2(treatment: str) -> None:
    direct = direct_table({("mlp_out", 5): 3.0, ("attn_out", 4): 1.0}, treatment=treatment)
    rows = layers.evidence_c2(complete(treatment=treatment), direct, "model", scales())
    assert all(list(row) == list(EVIDENCE) for row in rows)
    known = dict.fromkeys(VARIANTS, 3.6 / 5)
    known |= {"per patch norm": 1.8 / (1.8 + 1.4), "per parameter": 0.4 / (0.4 + 1.4)}
    found = pd.DataFrame(rows).set_index(["quantity", "variant"]).estimate
    assert found["MLP share of NIE"].to_dict() == pytest.approx(known)
    written = {"main": 0.75, "per patch norm": 1.5 / 2.5, "per parameter": (1 / 3) / (4 / 3)}
    assert found["MLP share of direct effects"].to_dict() == pytest.approx(written)


def test_preconditions_are_those_of_the_test_pairs() -> None:
    clean = pd.concat([effect_table(te=2.0), effect_table(te=-1.0, treatment="T1", seed=2)], ignore_index=True)
    clean = shifted(clean.drop_duplicates("pair_id"), "discover", te=100).assign(joint=0.9, earliest=2)
    rows = {row["quantity"]: row for row in layers.precondition_rows(clean, "m", N_LAYERS)}
    names = [f"{what} {treatment}" for what in ("TE", "joint probability") for treatment in ("T2", "T1")]
    assert list(rows) == [*names, "earliest possible depth"]
    assert rows["joint probability T1"]["estimate"] == pytest.approx(0.9)
    assert rows["earliest possible depth"]["estimate"] == pytest.approx(2.5 / N_LAYERS)
    for name, sign in (("T1", -1), ("T2", 1)):
        row, test = rows[f"TE {name}"], clean[(clean.split == "test") & (clean.treatment == name)]
        assert row["estimate"] == pytest.approx(test.te.mean()) and sign * row["estimate"] > 0.5
        assert row["ci_low"] < row["estimate"] < row["ci_high"] and (row["n_pairs"], row["n_topics"]) == (30, 15)
    alone = layers.precondition_rows(clean[(clean.split != "test") | (clean.topic == "topic 49")], "m", N_LAYERS)[0]
    assert (alone["ci_low"], alone["ci_high"], alone["n_topics"]) == (-np.inf, np.inf, 1)


def test_one_topic_in_discover_or_test_gives_no_share_and_no_wrapped_request_no_row() -> None:
    table = complete()
    for split, topic in (("discover", "topic 0"), ("test", "topic 49")):
        thin = table[(table.split != split) | (table.topic == topic) | table.treatment.str.startswith("B")]
        assert layers.evidence_c1(thin, "m", N_LAYERS) == []
        rows = layers.evidence_c2(thin, direct_table(), "m", scales())
        assert {row["quantity"] for row in rows} == {"MLP share of direct effects"}
    for name in ("B1", "T1", "T2b"):
        assert layers.evidence_c2(effect_table(treatment=name), direct_table(treatment=name), "m", scales()) == []


def test_a_topic_with_treatments_of_its_own_stops_nothing() -> None:
    """Pairs of unequal length are dropped, so a topic may lose all pairs of one behaviour, and share others."""
    table = complete()
    lost = (table.treatment == "B3") & (table.topic == "benign 49")
    shared = (table.treatment == "B2") & (table.topic == "benign 48")
    table = table[~lost].assign(topic=table.topic.where(~shared, "topic 48"))
    rows = layers.evidence_c1(table, "m", N_LAYERS)
    assert find(rows, "centroid difference")["estimate"] == pytest.approx(21.9 / 30 - 0.5)
    assert np.isfinite(find(rows, "centroid difference")["ci_low"])
    sizes = {row["quantity"]: (row["n_pairs"], row["n_topics"]) for row in rows}
    assert (sizes["centroid difference"], sizes["centroid B3"]) == ((30, 15), (28, 14))


def test_which_benign_behaviours_count() -> None:
    weak = effect_table(te=0.4, treatment="B7", topics="benign")
    late = shifted(effect_table(te=0.4, treatment="B8", topics="benign"), "test", te=10)
    negative = effect_table({("mlp_out", 2): -0.4}, te=-0.6, treatment="B9", topics="benign")
    silent = benign_tables(3).query("treatment == 'B3'").assign(nie0=0.0, nie1=0.0)
    table = pd.concat([effect_table(), benign_tables(2), silent, weak, late, negative], ignore_index=True)
    assert sorted(layers.usable_benign(table).treatment.unique()) == ["B1", "B2", "B9"]
    assert layers.usable_benign(effect_table()).empty


PSI = "psi0 early, shared tokens"
WORDS = tuple(f"{cue}{i}" for i in range(40) for cue in ("low", "high", "off", "on"))


def recognition(cue: str) -> tuple[Subject, list[TokenPair], pd.DataFrame]:
    """A compiled model that reads cue B (`high`) at layer 0 or cue A (`on`) at layer 1, with words of each topic's own."""
    tokenizer = models.word_tokenizer(words=(*models.WORDS, *WORDS))
    program = Program(gain=6, always=0, both=1) if cue == "high" else Program(gain=6)
    subject = compiled(program, tokenizer=tokenizer)
    embedding = subject.model.model.embed_tokens.weight
    for word in WORDS:
        own, kind = (tokenizer.convert_tokens_to_ids(name) for name in (word, word.rstrip("0123456789")))
        embedding[own] = embedding[kind]
    off, fixed = {"high": ("low", "on"), "on": ("off", "be")}[cue]
    pairs = []
    for i in range(40):
        texts = [f"please {fixed} do {word}{i} it now" for word in (off, cue)]
        pair = Pair(f"T1-{i}", "T1", f"topic {i}", *texts, "discover" if i < 16 else "test")
        pairs.append(token_pair(pair, tokenizer)[0])
    wanted = estimands.mediators(subject, ["resid_post"], ["shared", "last"])
    return subject, pairs, estimands.measure_effects(subject, pairs, {"T1": said(subject)}, wanted)


@pytest.mark.parametrize(("cue", "psi", "area"), [("high", 1.0, 1.0), ("on", 0.0, 0.5)])
def test_c3_of_compiled_models(cue: str, psi: float, area: float) -> None:
    """Cue B is carried to the shared tokens by layer 0, the deepest early one of four; cue A only by layer 1."""
    subject, pairs, table = recognition(cue)
    rows = layers.evidence_c3(subject, pairs, table, "m")
    assert all(list(row) == list(EVIDENCE) for row in rows)
    found = {(row["quantity"], row["variant"]): row for row in rows}
    areas = ("AUROC probe", "AUROC bag of tokens", "AUROC gain")
    assert set(found) == {(PSI, "main"), (PSI, "unsaturated"), *((name, "main") for name in areas)}
    assert table.te.abs().min() > 2
    for row in (found[PSI, "main"], found[PSI, "unsaturated"]):
        assert [row["estimate"], row["ci_low"], row["ci_high"]] == pytest.approx([psi] * 3, abs=1e-3)
    assert found["AUROC probe", "main"]["estimate"] == pytest.approx(area, abs=0.02)
    assert found["AUROC bag of tokens", "main"]["estimate"] == 0.5  # no topic's words are those of another
    assert found["AUROC gain", "main"]["estimate"] == pytest.approx(area - 0.5, abs=0.02)
    assert {(row["n_pairs"], row["n_topics"]) for row in rows} == {(24, 24)}
    told = [re.sub(r"\d+", "", text) for p in pairs for text in (p.pair.control, p.pair.treated)]
    shared = [replace(p.pair, control=a, treated=b) for p, a, b in zip(pairs, told[::2], told[1::2], strict=True)]
    rows = layers.evidence_c3(subject, [token_pair(one, subject.tokenizer)[0] for one in shared], table, "m")
    assert find(rows, "AUROC bag of tokens")["estimate"] == 1  # the same words in every topic
    # Thin sets give what they can: pairs 0 to 15 are of discover, the others of test.
    for some, quantities in ((pairs[:16], set()), (pairs[16:], {PSI}), (pairs[:17], set())):
        rows = layers.evidence_c3(subject, some, table[table.pair_id.isin([one.pair.id for one in some])], "m")
        assert {row["quantity"] for row in rows} == quantities


# ---- probes ----


def areas(first: np.ndarray, second: np.ndarray) -> list[float]:
    """What `auroc` gives, by scikit-learn."""
    one, other = (roc_auc_score(np.tile([0, 1], len(scores)), scores.reshape(-1)) for scores in (first, second))
    return [one, other, one - other]


def clustered_scores(n_pairs: int, n_topics: int, strength: float, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Scores with ties and a part that all pairs of a topic share; topics of different sizes."""
    rng = np.random.default_rng(seed)
    topics = np.sort(rng.integers(n_topics, size=n_pairs))
    shared = rng.standard_normal(n_topics)[topics][:, None]
    scores = rng.standard_normal((n_pairs, 2)) + shared + strength * np.array([0, 1])
    return scores.round(1), [f"topic {topic}" for topic in topics]


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_scikit_learns(seed: int) -> None:
    (first, topics), (second, _) = (clustered_scores(60, 20, strength, seed) for strength in (1.0, 0.2))
    found = layers.auroc({"a": first, "b": second}, topics)
    assert found.estimate == pytest.approx(areas(first, second)) and found.n_clusters == len(set(topics))
    assert (found.low < found.estimate).all() and (found.estimate < found.high).all()


def test_a_resample_of_topics_is_the_auroc_of_the_resampled_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, topics = clustered_scores(30, 8, 0.7)
    seen = []
    monkeypatch.setattr(layers.bootstrap, "bootstrap", lambda sums, statistic: seen.append((sums, statistic)))
    layers.auroc({"a": scores, "b": scores[::-1]}, topics)
    ((sums, statistic),) = seen
    n = len(sums.clusters)
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=20)
    for row, weight in zip(statistic(weights @ sums.sums, weights @ sums.counts), weights, strict=True):
        times = weight[[list(sums.clusters).index(topic) for topic in topics]]
        assert row == pytest.approx(areas(*(np.repeat(some, times, axis=0) for some in (scores, scores[::-1]))))


def test_features_are_means_over_shared_tokens() -> None:
    subject = models.compiled(Program())
    pairs = [*models.cue_pairs(subject.tokenizer, "off low", "on high", n=4)]
    ordered, features = layers.shared_token_features(subject, pairs, 1)
    assert sorted(p.pair.id for p in ordered) == sorted(p.pair.id for p in pairs)
    assert features.shape == (4, 2, models.WIDTH)
    for pair, row in zip(ordered, features, strict=True):
        differ = np.flatnonzero(pair.control != pair.treated)
        shared = [i for i in range(differ[0] + 1, len(pair.control)) if i not in differ]
        for side, ids in enumerate((pair.control, pair.treated)):
            resid = activations.clean_run(subject, torch.tensor(ids)[None]).resid_post[1][0]
            np.testing.assert_allclose(row[side], resid[shared].mean(0), rtol=1e-5, atol=1e-5)
        assert not np.allclose(row[0], row[1])
    subject, pairs = replace(tiny_subject("llama"), tokenizer=models.word_tokenizer()), random_pairs(3, 8, 61)
    pairs[1].treated[3:] = (pairs[1].control[3:] - 2) % 58 + 3  # a pair that shares no token has nothing to read
    ordered, features = layers.shared_token_features(subject, pairs, 1)
    assert (features[[p.pair.id for p in ordered].index("p1")] == 0).all() and np.isfinite(features).all()


# ---- two samples ----

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
    keys = found.index.drop(("C3", PSI))
    same = known.loc[keys, ["estimate", "ci_low", "ci_high"]].to_numpy()
    assert (found.loc[keys, ["estimate", "low", "high"]].to_numpy() == same).all()
    assert found.levels.tolist() == [4, 4, compiled_language.VERBS, 4]
    assert (found["drawn with topics"] == "verbs").sum() == 1
    width = (found["high both"] - found["low both"]) / (found.high - found.low)
    assert width.to_list() == pytest.approx(found.wider.to_list()) and (found.wider > 1).all()


def test_one_family_is_no_sample_of_families(effects: tuple, tmp_path: Path) -> None:
    tables, pairs = effects
    one = two_way_table({"modules": tables["modules"]}, [with_words(p, 1) for p in pairs])
    assert isinstance(one, NotDefined) and "families" in str(one)
    assert layers.read_effects(tmp_path) == {}
    files.write_table(tables["carried"], tmp_path / layers.FILES["carried"])
    (read,) = layers.read_effects(tmp_path).values()
    pd.testing.assert_frame_equal(read, tables["carried"], check_like=True)
    pair = with_words(pairs[1], 3)
    told = [replace(pair, treatment="T2", family="tale-4"), replace(pair, id="x", treatment="B1")]
    assert second_level(told) == {pair.id: "tale"} and second_level([replace(pair, treatment="T1", spans={})]) == {}
