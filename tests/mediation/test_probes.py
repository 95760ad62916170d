"""Probes: the AUROC against scikit-learn, planted and memorised signals, features of shared tokens."""

import handmade
import numpy as np
import pytest
import torch
from handmade import Program, random_pairs
from sklearn.metrics import roc_auc_score

from companion.base.errors import InputError
from companion.mediation import probes
from companion.model import activations
from companion.prompts import positions


def plain(scores: np.ndarray) -> float:
    return roc_auc_score(np.tile([0, 1], len(scores)), scores.reshape(-1))


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
    found, names = probes.auroc({"a": first, "b": second}, topics)
    assert names == ("a", "b", "gain")
    assert found.estimate == pytest.approx([plain(first), plain(second), plain(first) - plain(second)])
    assert found.n_clusters == len(set(topics)) and (found.low < found.estimate).all()
    assert (found.estimate < found.high).all()


def test_a_resample_of_topics_is_the_auroc_of_the_resampled_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, topics = clustered_scores(30, 8, 0.7)
    seen = []
    monkeypatch.setattr(probes.bootstrap, "bootstrap", lambda sums, statistic: seen.append((sums, statistic)))
    probes.auroc({"a": scores, "b": scores[::-1]}, topics)
    ((sums, statistic),) = seen
    n = len(sums.clusters)
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=20)
    found = statistic(weights @ sums.sums, weights @ sums.counts)
    for row, weight in zip(found, weights, strict=True):
        times = weight[[list(sums.clusters).index(topic) for topic in topics]]
        drawn = np.repeat(scores, times, axis=0)
        assert row[0] == pytest.approx(plain(drawn))
        assert row[2] == pytest.approx(plain(drawn) - plain(np.repeat(scores[::-1], times, axis=0)))


TOPICS = np.arange(80) // 2  # two pairs each, the first half of them in discover
DISCOVER, TEST = TOPICS < 20, TOPICS >= 20


def test_a_memorised_topic_is_worth_nothing_and_labels_of_held_out_topics_are_not_used() -> None:
    """One feature a topic, +1 in the treated prompt: perfect on the topics it was fitted on, silent on others."""
    features = np.eye(40)[TOPICS][:, None] * np.array([-1, 1])[:, None]
    found = [plain(probes.held_out_scores(features, DISCOVER, scored)) for scored in (DISCOVER, TEST)]
    assert found == [1.0, 0.5]
    features = np.random.default_rng(1).standard_normal((80, 2, 6))
    features[:, 1, 0] += np.where(DISCOVER, 3, -3)  # the opposite on held-out topics
    assert plain(probes.held_out_scores(features, DISCOVER, TEST)) < 0.1
    for masks in ((DISCOVER, TEST & False), (DISCOVER & False, TEST)):
        with pytest.raises(InputError, match="needs pairs in the discover and in the test split"):
            probes.held_out_scores(features, *masks)


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
    pairs = random_pairs(3, 8, len(subject.tokenizer))
    pairs[1].treated[3:] = pairs[1].control[3:] % 10 + 3  # shares no token
    ordered, features = probes.shared_token_features(subject, pairs, 1)
    assert not features[[p.pair.id for p in ordered].index("p1")].any() and np.isfinite(features).all()


def test_token_counts() -> None:
    pairs = random_pairs(3, 8, 61)
    pairs[0].control[:] = [150_000, 5, 5, 5, 7, 150_000, 9, 9]
    counts = probes.token_counts(pairs)
    used = sorted({int(i) for p in pairs for ids in (p.control, p.treated) for i in ids})
    assert counts.shape == (3, 2, len(used))  # a vocabulary of 150,000 costs nothing
    for pair, row in zip(pairs, counts, strict=True):
        for ids, side in zip((pair.control, pair.treated), row, strict=True):
            assert side.tolist() == [(ids == i).sum() for i in used]
