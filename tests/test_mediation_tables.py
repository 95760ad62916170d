"""Effect tables: whose rows they are, and what must not change them."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from effect_tools import DIRECT, SITES, YES_NO, log_odds, mixed_pairs, of, one, runs
from families import tiny_subject
from handmade import Program, compiled, cue_pairs, random_pairs

from companion.mediation import estimands
from companion.mediation.estimands import Mediator, difference, measure_effects, mediators
from companion.model import memory
from companion.prompts.tokens import Openers

# ---- what must not matter, and tables ----


def test_batches_are_of_one_treatment_and_length() -> None:
    pairs = mixed_pairs()
    made = estimands.batches(pairs, size=2)
    assert sorted(pair.pair.id for batch in made for pair in batch) == sorted(pair.pair.id for pair in pairs)
    assert all(len({(pair.pair.treatment, len(pair.control)) for pair in batch}) == 1 for batch in made)
    assert sorted(len(batch) for batch in made) == [1] * 4 + [2] * 4
    assert made == estimands.batches(pairs, size=2)
    mixed = estimands.batches(pairs, mixed=True)
    assert [{len(pair.control) for pair in batch} for batch in mixed] == [
        {n} for n in sorted({len(p.control) for p in pairs})
    ]


def test_rows_belong_to_their_pairs() -> None:
    subject = tiny_subject("qwen2")
    pairs = mixed_pairs()
    openers = {"T2": YES_NO, "B1": Openers((5,), (6,))}
    wanted = mediators(subject, ["attn_out", "head"], ["last", "differ"])
    table = measure_effects(subject, pairs, openers, wanted, ("Y1", "Y1.frozen"))
    assert len(table) == len(pairs) * len(wanted) * 2
    assert not table.duplicated(["pair_id", *estimands.KEYS]).any()
    for pair in pairs:
        rows = table[(table.pair_id == pair.pair.id) & (table.outcome == "Y1")]
        clean = [float(log_odds(logits, openers[pair.pair.treatment])) for logits in runs(subject, [pair])]
        np.testing.assert_allclose(rows[["y00", "y11"]], [clean] * len(rows), atol=1e-4)
        assert (
            rows[["topic", "treatment", "split"]].drop_duplicates()
            == [pair.pair.topic, pair.pair.treatment, "discover"]
        ).all(axis=None)


def test_batch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("qwen2")
    pairs, wanted = mixed_pairs(), mediators(subject, [*SITES, *DIRECT], ["last", "differ"])
    keys = ["pair_id", *estimands.KEYS]
    whole = measure_effects(subject, pairs, of(None, "T2", "B1"), wanted).set_index(keys).sort_index()
    monkeypatch.setattr(estimands, "batches", partial(estimands.batches, size=1))
    single = measure_effects(subject, pairs, of(None, "T2", "B1"), wanted).set_index(keys).sort_index()
    cells = ["y00", "y01", "y10", "y11", "te", "nie0", "nie1"]
    np.testing.assert_allclose(whole[cells], single[cells], atol=2e-5 * whole.te.abs().max())


def test_long_prompts_run_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pairs at once as keep a clean run below its share of memory, at least one."""
    subject = tiny_subject("llama")
    pairs = random_pairs(12, 9, 61)
    one = memory.sweep_memory(subject, 1, 9).clean_run
    for budget, sizes in ((10**9, [12]), (5 * one, [5, 5, 2]), (one // 2, [1] * 12)):
        monkeypatch.setattr(memory, "CLEAN_RUN_BYTES", budget)
        assert [len(batch) for batch in estimands.batches(pairs, subject)] == sizes
    one_pair = measure_effects(subject, pairs[:3], of(), mediators(subject, ["attn_out"]))
    monkeypatch.setattr(memory, "CLEAN_RUN_BYTES", 10**9)
    few = measure_effects(subject, pairs[:3], of(), mediators(subject, ["attn_out"]))
    np.testing.assert_allclose(few[["y01", "y10"]], one_pair[["y01", "y10"]], atol=1e-5)


def test_mediators_may_depend_on_the_treatment() -> None:
    subject = tiny_subject("llama")
    own = {"T2": [Mediator("attn_out", 1)], "B1": [Mediator("mlp_out", 2), Mediator("attn_out", 1)]}
    seen = []
    table = measure_effects(subject, mixed_pairs(), of(None, "T2", "B1"), own.__getitem__, watch=seen.append)
    sites = {name: set(zip(part.site, part.layer, strict=True)) for name, part in table.groupby("treatment")}
    assert sites == {"T2": {("attn_out", 1)}, "B1": {("mlp_out", 2), ("attn_out", 1)}}
    same = measure_effects(subject, mixed_pairs(), of(None, "T2", "B1"), own["T2"])
    both = table[table.site == "attn_out"].reset_index(drop=True)
    np.testing.assert_allclose(both[["y00", "y01", "y10", "y11"]], same[["y00", "y01", "y10", "y11"]], atol=1e-5)
    assert [pair.pair.id for batch in seen for pair in batch.pairs] == same.pair_id.tolist()


def test_pad_side_does_not_matter() -> None:
    program = Program(skip=0.7)
    tables = []
    for side in ("left", "right"):
        subject = compiled(program)
        subject.tokenizer.padding_side = side
        pairs = cue_pairs(subject.tokenizer, "off low", "on low", n=4)
        tables.append(measure_effects(subject, pairs, of(Openers((16,), (17,))), mediators(subject, [*SITES, *DIRECT])))
    assert tables[0].equals(tables[1])


def test_a_second_run_gives_the_same_bytes() -> None:
    subject = tiny_subject("qwen2")
    wanted = mediators(subject, [*SITES, *DIRECT], ["last", "differ", "rest"])
    first, second = (
        measure_effects(subject, mixed_pairs(), of(None, "T2", "B1"), wanted, ("Y1", "Y1.frozen", "contrast.frozen"))
        for _ in range(2)
    )
    assert first.equals(second)
    assert pd.util.hash_pandas_object(first).sum() == pd.util.hash_pandas_object(second).sum()


def test_an_empty_position_group_has_no_effect() -> None:
    subject = tiny_subject("llama")
    table = one(
        subject, random_pairs(3, 9, 61), Mediator("resid_post", 1, "wrapper"), Mediator("attn_out.direct", 1, "wrapper")
    )
    assert (table[["nie0", "nie1"]] == 0).all(axis=None)


def test_mediators_of_every_layer_head_and_group() -> None:
    subject = tiny_subject("llama")
    made = mediators(subject, ["mlp_out", "head.direct"], ["last", "differ"])
    assert len(made) == len(set(made)) == 2 * (4 + 4 * 4)
    assert Mediator("mlp_out", 3, "differ") in made
    assert Mediator("head.direct", 2, "last", 3) in made


def test_difference_needs_the_twin_and_the_same_cell() -> None:
    rows = [("a", "T2", 0, 5.0), ("a", "T2", 1, 6.0), ("b", "T2", 0, 7.0), ("x", "T2b", 0, 1.0), ("x", "T2b", 1, 2.5)]
    table = pd.DataFrame(rows, columns=["pair_id", "treatment", "layer", "y11"])
    table = table.assign(
        y00=1.0, y01=2.0, y10=3.0, site="mlp_out", head=-1, position="last", outcome="Y1", topic="t", split="test"
    )
    made = difference(table, {"a": "x", "b": "gone"})
    assert made[["pair_id", "layer", "y11", "te"]].values.tolist() == [["a", 0, 4.0, 4.0], ["a", 1, 3.5, 3.5]]
    assert (made[["y00", "y01", "y10", "nie0"]] == 0).all(axis=None)
    assert not [name for name in made if "twin" in name]
