"""Probes: the AUROC against scikit-learn, planted and memorised signals, features of shared tokens."""

import handmade
import numpy as np
import pytest
import torch
from families import tiny_subject
from handmade import Program, random_pairs
from sklearn.metrics import roc_auc_score

from companion.base.errors import InputError
from companion.evidence import layers
from companion.model import activations
from companion.model.architecture import Subject
from companion.prompts import positions


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


@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_scikit_learns(seed: int) -> None:
    (first, topics), (second, _) = clustered_scores(seed=seed, strength=1.0), clustered_scores(seed=seed, strength=0.2)
    found, names = layers.auroc({"a": first, "b": second}, topics)
    assert names == ("a", "b", "gain")
    assert found.estimate == pytest.approx([plain(first), plain(second), plain(first) - plain(second)])
    assert found.n_clusters == len(set(topics))
    assert (found.low < found.estimate).all()
    assert (found.estimate < found.high).all()


def test_a_resample_of_topics_is_the_auroc_of_the_resampled_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, topics = clustered_scores(30, 8)
    seen = []
    monkeypatch.setattr(layers.bootstrap, "bootstrap", lambda sums, statistic: seen.append((sums, statistic)))
    layers.auroc({"a": scores, "b": scores[::-1]}, topics)
    ((sums, statistic),) = seen
    n = len(sums.clusters)
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=20)
    found = statistic(weights @ sums.sums, weights @ sums.counts)
    for row, weight in zip(found, weights, strict=True):
        times = weight[[list(sums.clusters).index(topic) for topic in topics]]
        drawn = np.repeat(scores, times, axis=0)
        assert row[0] == pytest.approx(plain(drawn))
        assert row[2] == pytest.approx(plain(drawn) - plain(np.repeat(scores[::-1], times, axis=0)))


def halves(n_pairs: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Topics of two pairs each, the first half of them in discover."""
    topics = np.arange(n_pairs) // 2
    return topics, topics < n_pairs // 4, topics >= n_pairs // 4


def test_a_memorised_topic_is_worth_nothing() -> None:
    """One feature a topic, +1 in the treated prompt: perfect on the topics it was fitted on, silent on others."""
    topics, discover, test = halves()
    features = np.eye(topics.max() + 1)[topics][:, None] * np.array([-1, 1])[:, None]
    assert plain(layers.held_out_scores(features, discover, discover)) == 1.0
    assert plain(layers.held_out_scores(features, discover, test)) == 0.5


def test_labels_of_held_out_topics_are_not_used() -> None:
    _, discover, test = halves()
    features = np.random.default_rng(1).standard_normal((80, 2, 6))
    features[discover, 1, 0] += 3
    features[test, 1, 0] -= 3  # the opposite on held-out topics
    assert plain(layers.held_out_scores(features, discover, test)) < 0.1


@pytest.mark.parametrize("empty", ["discover", "test"])
def test_a_probe_needs_both_splits(empty: str) -> None:
    _, discover, test = halves()
    masks = {"discover": discover, "test": test, empty: np.zeros(80, dtype=bool)}
    with pytest.raises(InputError, match="needs pairs in the discover and in the test split"):
        layers.held_out_scores(np.zeros((80, 2, 3)), masks["discover"], masks["test"])


def test_features_are_means_over_shared_tokens() -> None:
    subject = handmade.compiled(Program())
    pairs = [*handmade.cue_pairs(subject.tokenizer, "off low", "on high", n=4)]
    ordered, features = layers.shared_token_features(subject, pairs, 1)
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
    ordered, features = layers.shared_token_features(subject, pairs, 1)
    silent = [p.pair.id for p in ordered].index("p1")
    assert (features[silent] == 0).all()
    assert np.isfinite(features).all()


def test_token_counts() -> None:
    pairs = random_pairs(3, 8, 61)
    pairs[0].control[:] = [150_000, 5, 5, 5, 7, 150_000, 9, 9]
    counts = layers.token_counts(pairs)
    used = sorted({int(i) for p in pairs for ids in (p.control, p.treated) for i in ids})
    assert counts.shape == (3, 2, len(used))  # a vocabulary of 150,000 costs nothing
    for pair, row in zip(pairs, counts, strict=True):
        for ids, side in zip((pair.control, pair.treated), row, strict=True):
            assert side.tolist() == [(ids == i).sum() for i in used]
