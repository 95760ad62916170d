"""Fewer pairs: splits, twins, topics and kinds of pairs stay as they were."""

from collections import Counter
from dataclasses import replace

import pytest

from companion.base.errors import InputError
from companion.prompts.pairs import SPLITS, Pair, load_set, subsample


def paired(n_topics: int = 20, repeats: int = 3) -> list[Pair]:
    """T2 pairs and their twins, whose order in the file is the reverse; 40/30/30 of the topics in each split."""
    cuts = {"discover": 0.4 * n_topics, "validate": 0.7 * n_topics, "test": n_topics}
    made = []
    for treatment in ("T2", "T2b", "B1"):
        for topic in range(n_topics):
            split = next(split for split, cut in cuts.items() if topic < cut)
            for k in range(repeats):
                twin = f"T2b-{topic}.{k}" if treatment == "T2" else None
                made.append(Pair(f"{treatment}-{topic}.{k}", treatment, str(topic), "a", "b", split, twin))
    return made[: n_topics * repeats] + made[n_topics * repeats :][::-1]


@pytest.mark.parametrize("n", [10, 11, 17, 24, 33, 40, 57])
def test_limit_keeps_at_most_n_of_each_split(n: int) -> None:
    kept = subsample(paired(), n)
    for treatment in ("T2", "T2b", "B1"):
        splits = Counter(pair.split for pair in kept if pair.treatment == treatment)
        assert n - 3 < sum(splits.values()) <= n
        for split, share in zip(SPLITS, (0.4, 0.3, 0.3), strict=True):
            assert abs(splits[split] - share * n) < 1.001


def test_limit_keeps_twins_topics_and_the_order_and_does_not_depend_on_it() -> None:
    pairs = paired()
    kept = subsample(pairs, 20)
    assert [pair for pair in pairs if pair in kept] == list(kept)
    harmful = [pair for pair in kept if pair.treatment == "T2"]
    assert {pair.twin for pair in harmful} == {pair.id for pair in kept if pair.treatment == "T2b"}
    assert len({pair.topic for pair in harmful}) == 20  # every topic once before any topic twice
    alone = [replace(pair, twin=None) for pair in pairs]
    assert Counter(pair.treatment for pair in subsample(alone, 20)) == {"T2": 20, "T2b": 20, "B1": 20}
    assert {pair.id for pair in subsample(pairs, 23)} == {pair.id for pair in subsample(pairs[::-1], 23)}


def test_limit_of_nothing_and_of_too_few() -> None:
    pairs = paired()
    assert subsample(pairs, 0) == tuple(pairs)
    assert subsample(pairs, 10_000) == tuple(pairs)
    for n in (-1, 1, 9):
        with pytest.raises(InputError, match=f"--pairs {n}: at least 10 pairs"):
            subsample(pairs, n)


def test_the_shipped_set_keeps_its_kinds() -> None:
    pairs = [pair for pair in load_set("embedded").pairs if pair.treatment == "T1"]
    kept = subsample(pairs, 120)
    assert len({pair.topic for pair in kept}) == 120
    for split in SPLITS:
        whole, few = (Counter(p.family for p in some if p.split == split) for some in (pairs, kept))
        assert all(abs(few[kind] / few.total() - whole[kind] / whole.total()) < 0.2 for kind in whole)
