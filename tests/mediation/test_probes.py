"""Probes: the AUROC against scikit-learn, planted and memorised signals, and C3 on compiled models."""

import handmade
import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_subject
from handmade import Program, compiled, random_pairs
from sklearn.metrics import roc_auc_score

from companion.base.errors import InputError
from companion.base.files import EVIDENCE
from companion.evidence import layers
from companion.mediation import estimands, probes
from companion.model import activations
from companion.model.architecture import Subject
from companion.prompts import positions
from companion.prompts.pairs import Pair
from companion.prompts.tokens import Openers, TokenPair, token_pair


def plain(scores: np.ndarray) -> float:
    return roc_auc_score(np.tile([0, 1], len(scores)), scores.reshape(-1))


def clustered_scores(
    n_pairs: int = 60, n_topics: int = 20, *, strength: float = 0.7, seed: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Scores with ties and a part that all pairs of a topic share; topics of different sizes."""
    rng = np.random.default_rng(seed)
    topics = np.sort(rng.integers(n_topics, size=n_pairs))
    shared = rng.standard_normal(n_topics)[topics][:, None]
    scores = rng.standard_normal((n_pairs, 2)) + shared + strength * np.array([0, 1])
    return scores.round(1), [f"topic {topic}" for topic in topics]


# ---- AUROC ----


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_scikit_learns(seed: int) -> None:
    (first, topics), (second, _) = clustered_scores(seed=seed, strength=1.0), clustered_scores(seed=seed, strength=0.2)
    found, names = probes.auroc({"a": first, "b": second}, topics)
    assert names == ("a", "b", "gain")
    assert found.estimate == pytest.approx([plain(first), plain(second), plain(first) - plain(second)])
    assert found.n_clusters == len(set(topics))
    assert (found.low < found.estimate).all()
    assert (found.estimate < found.high).all()


def test_a_resample_of_topics_is_the_auroc_of_the_resampled_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, topics = clustered_scores(30, 8)
    seen = []
    monkeypatch.setattr(probes.bs, "bootstrap", lambda sums, statistic: seen.append((sums, statistic)))
    probes.auroc({"a": scores, "b": scores[::-1]}, topics)
    ((sums, statistic),) = seen
    weights = np.random.default_rng(1).multinomial(
        len(sums.clusters), np.full(len(sums.clusters), 1 / len(sums.clusters)), size=20
    )
    found = statistic(weights @ sums.sums, weights @ sums.counts)
    for row, weight in zip(found, weights, strict=True):
        times = weight[[list(sums.clusters).index(topic) for topic in topics]]
        drawn = np.repeat(scores, times, axis=0)
        assert row[0] == pytest.approx(plain(drawn))
        assert row[2] == pytest.approx(plain(drawn) - plain(np.repeat(scores[::-1], times, axis=0)))


def test_the_interval_is_that_of_topics_not_of_pairs() -> None:
    """All pairs of a topic alike: ten copies of every pair must not narrow the interval."""
    base = np.random.default_rng(3).standard_normal((25, 2)) + np.array([0, 0.7])
    once, _ = probes.auroc({"a": base, "b": -base}, [f"t{i}" for i in range(25)])
    often, _ = probes.auroc(
        {"a": np.repeat(base, 10, 0), "b": -np.repeat(base, 10, 0)}, [f"t{i}" for i in np.repeat(range(25), 10)]
    )
    np.testing.assert_allclose([once.estimate, once.low, once.high], [often.estimate, often.low, often.high])


def test_perfect_and_useless_scores() -> None:
    scores = np.array([[0.0, 1.0], [0.2, 1.3], [0.1, 2.0], [0.5, 0.9]])
    found, _ = probes.auroc({"a": scores, "b": np.zeros((4, 2))}, ["x", "x", "y", "z"])
    assert found.estimate.tolist() == [1.0, 0.5, 0.5]
    assert found.low.tolist() == found.high.tolist() == [1.0, 0.5, 0.5]


# ---- held-out scores ----


def halves(n_pairs: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Topics of two pairs each, the first half of them in discover."""
    topics = np.arange(n_pairs) // 2
    return topics, topics < n_pairs // 4, topics >= n_pairs // 4


def test_a_planted_signal_is_found_on_held_out_topics() -> None:
    topics, discover, test = halves()
    features = np.random.default_rng(0).standard_normal((80, 2, 12)) * 0.5
    features[:, 1] += np.linspace(0, 1, 12)
    scores = probes.held_out_scores(features, discover, test)
    assert scores.shape == (40, 2)
    assert plain(scores) > 0.95
    assert probes.auroc({"a": scores, "b": scores * 0}, topics[test].tolist())[0].low[0] > 0.9


def test_a_memorised_topic_is_worth_nothing() -> None:
    """One feature a topic, +1 in the treated prompt: perfect on the topics it was fitted on, silent on others."""
    topics, discover, test = halves()
    features = np.eye(topics.max() + 1)[topics][:, None] * np.array([-1, 1])[:, None]
    assert plain(probes.held_out_scores(features, discover, discover)) == 1.0
    assert plain(probes.held_out_scores(features, discover, test)) == 0.5


def test_labels_of_held_out_topics_are_not_used() -> None:
    topics, discover, test = halves()
    features = np.random.default_rng(1).standard_normal((80, 2, 6))
    features[discover, 1, 0] += 3
    features[test, 1, 0] -= 3  # the opposite on held-out topics
    assert plain(probes.held_out_scores(features, discover, test)) < 0.1
    fewer = test & (topics < 30)
    np.testing.assert_allclose(
        probes.held_out_scores(features, discover, test)[: fewer.sum()],
        probes.held_out_scores(features, discover, fewer),
    )


@pytest.mark.parametrize("empty", ["discover", "test"])
def test_a_probe_needs_both_splits(empty: str) -> None:
    _, discover, test = halves()
    masks = {"discover": discover, "test": test, empty: np.zeros(80, dtype=bool)}
    with pytest.raises(InputError, match="needs pairs in the discover and in the test split"):
        probes.held_out_scores(np.zeros((80, 2, 3)), masks["discover"], masks["test"])


# ---- features ----


def test_features_are_means_over_shared_tokens() -> None:
    subject = handmade.compiled(Program())
    pairs = [*handmade.cue_pairs(subject.tokenizer, "off low", "on high", n=4)]
    ordered, features = probes.shared_token_features(subject, pairs, 1)
    assert sorted(p.pair.id for p in ordered) == sorted(p.pair.id for p in pairs)
    assert features.shape == (4, 2, handmade.WIDTH)
    for pair, row in zip(ordered, features, strict=True):
        differ = np.flatnonzero(pair.control != pair.treated)
        shared = [i for i in range(differ[0] + 1, len(pair.control)) if i not in differ]
        assert shared == np.flatnonzero(positions.groups(pair, "")["shared"]).tolist()
        for side, ids in enumerate((pair.control, pair.treated)):
            resid = activations.clean_run(subject, torch.tensor(ids)[None]).resid_post[1][0]
            np.testing.assert_allclose(row[side], resid[shared].mean(0), rtol=1e-5, atol=1e-5)
        assert not np.allclose(row[0], row[1])


def test_a_pair_that_shares_no_token_has_nothing_to_read() -> None:
    subject = tiny_subject("llama")
    pairs = random_pairs(3, 8, 61)
    pairs[1].treated[3:] = (pairs[1].control[3:] - 2) % 58 + 3
    subject = Subject(**{**vars(subject), "tokenizer": handmade.word_tokenizer()})
    ordered, features = probes.shared_token_features(subject, pairs, 1)
    silent = [p.pair.id for p in ordered].index("p1")
    assert (features[silent] == 0).all()
    assert np.isfinite(features).all()


def test_token_counts() -> None:
    pairs = random_pairs(3, 8, 61)
    pairs[0].control[:] = [150_000, 5, 5, 5, 7, 150_000, 9, 9]
    counts = probes.token_counts(pairs)
    used = sorted({int(i) for p in pairs for ids in (p.control, p.treated) for i in ids})
    assert counts.shape == (3, 2, len(used))  # a vocabulary of 150,000 costs nothing
    for pair, row in zip(pairs, counts, strict=True):
        for ids, side in zip((pair.control, pair.treated), row, strict=True):
            assert side.tolist() == [(ids == i).sum() for i in used]


# ---- C3 ----

WORDS = tuple(f"{cue}{i}" for i in range(40) for cue in ("low", "high", "off", "on"))


def recognition(cue: str) -> tuple[Subject, list[TokenPair], pd.DataFrame]:
    """A compiled model that reads cue B (`high`) at layer 0 or cue A (`on`) at layer 1, with words of each topic's own."""
    tokenizer = handmade.word_tokenizer(words=(*handmade.WORDS, *WORDS))
    program = Program(gain=6, always=0, both=1) if cue == "high" else Program(gain=6)
    subject = compiled(program, tokenizer=tokenizer)
    embedding = subject.model.model.embed_tokens.weight
    for word in WORDS:
        own, kind = (tokenizer.convert_tokens_to_ids(name) for name in (word, word.rstrip("0123456789")))
        embedding[own] = embedding[kind]
    off, fixed = {"high": ("low", "on"), "on": ("off", "be")}[cue]
    pairs = []
    for i in range(40):
        control, treated = (f"please {fixed} do {word}{i} it now" for word in (off, cue))
        split = "discover" if i < 16 else "test"
        made, _ = token_pair(Pair(f"T1-{i}", "T1", f"topic {i}", control, treated, split), tokenizer)
        assert made is not None
        pairs.append(made)
    openers = {"T1": Openers(*((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))}
    wanted = estimands.mediators(subject, ["resid_post"], ["shared", "last"])
    return subject, pairs, estimands.measure_effects(subject, pairs, openers, wanted)


@pytest.mark.parametrize(("cue", "psi", "area"), [("high", 1.0, 1.0), ("on", 0.0, 0.5)])
def test_c3_of_compiled_models(cue: str, psi: float, area: float) -> None:
    """Cue B is carried to the shared tokens by layer 0, the deepest early one of four; cue A only by layer 1."""
    subject, pairs, table = recognition(cue)
    rows = layers.evidence_c3(subject, pairs, table, "m")
    assert all(list(row) == list(EVIDENCE) for row in rows)
    found = {(row["quantity"], row["variant"]): row for row in rows}
    assert set(found) == {
        ("psi0 early, shared tokens", "main"), ("psi0 early, shared tokens", "unsaturated"), ("AUROC probe", "main"),
        ("AUROC bag of tokens", "main"), ("AUROC gain", "main"),
    }  # fmt: skip
    assert table.te.abs().min() > 2
    for variant in ("main", "unsaturated"):
        row = found["psi0 early, shared tokens", variant]
        assert [row["estimate"], row["ci_low"], row["ci_high"]] == pytest.approx([psi] * 3, abs=1e-3)
    assert found["AUROC probe", "main"]["estimate"] == pytest.approx(area, abs=0.02)
    assert found["AUROC bag of tokens", "main"]["estimate"] == 0.5  # no topic's words are those of another
    assert found["AUROC gain", "main"]["estimate"] == pytest.approx(area - 0.5, abs=0.02)
    assert {row["n_topics"] for row in rows} == {24}
    assert {row["n_pairs"] for row in rows} == {24}


def test_c3_of_thin_sets_gives_what_it_can() -> None:
    subject, pairs, table = recognition("high")
    discover_only = [pair for pair in pairs if pair.pair.split == "discover"]
    assert layers.evidence_c3(subject, discover_only, table[table.split == "discover"], "m") == []
    test_only = [pair for pair in pairs if pair.pair.split == "test"]
    rows = layers.evidence_c3(subject, test_only, table[table.split == "test"], "m")
    assert {row["quantity"] for row in rows} == {"psi0 early, shared tokens"}
    lone = discover_only + test_only[:1]
    assert layers.evidence_c3(subject, lone, table[table.pair_id.isin([pair.pair.id for pair in lone])], "m") == []
