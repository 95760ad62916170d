"""Gate or contributor: the four cells on models made by hand whose effects plain arithmetic knows."""

from functools import partial

import gate_models as gm
import numpy as np
import pandas as pd
import pytest
from gate_models import CLOSE, TOKENIZER, YES_NO
from models import cue_pairs, random_pairs, tiny_subject
from oracles import clean_batch, tiny_study

from companion.mediation import estimands
from companion.mediation.estimands import CELLS, with_difference
from companion.neurons import gating
from companion.neurons.clamping import LastLayerCache, NeuronSet, four_cells, product
from companion.neurons.gating import select
from companion.prompts.tokens import Openers

# ---- clamping ----

BITS = {"off low": (0, 0), "on low": (1, 0), "off high": (0, 1), "on high": (1, 1)}
ONE = NeuronSet("set", 3, (0,))
# name: model, the neuron tested, control and treated cues, the signed indices upstream and inside (None: any), readout
CASES = {
    "additive": (gm.ADDITIVE, (3, 0), "off low", "on low", 0.0, 0.0, 1.0),
    "gated inside a neuron": (gm.INSIDE, (3, 0), "off low", "on high", 0.0, 2 / 3, 1.0),
    "one factor moves": (gm.INSIDE, (3, 0), "off low", "on low", 0.0, 0.0, 1.0),
    "gated below": (gm.BELOW, (2, 0), "off low", "on high", 1.0, 0.0, 0.0),
    "and": (gm.AND, (2, 0), "off low", "on high", 1.0, None, 0.0),
    "or": (gm.OR, (2, 0), "off low", "on high", -1.0, None, 0.0),
    "mixed": (gm.MIXED, (2, 0), "off low", "on low", 0.0, 0.0, 0.25),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_cells_indices_and_readout_are_those_of_plain_arithmetic(case: tuple) -> None:
    model, at, control, treated, upstream, inside, readout = case
    pairs = cue_pairs(TOKENIZER, control, treated, n=6)
    table = four_cells(gm.build(model), pairs, {"T2": YES_NO}, [NeuronSet("set", at[0], (at[1],))])
    bits = (BITS[control], BITS[treated])
    own = gm.crossed(model, at, *bits, bits[0])
    for form, cells, signed in (("upstream", gm.upstream(model, at, bits), upstream), ("inside", own, inside)):
        for outcome in ("Y1", "Y1.frozen"):
            part = select(table, "T2", "set", form, outcome)
            np.testing.assert_allclose(part[list(CELLS)], np.tile(cells, (6, 1)), atol=CLOSE * max(map(abs, cells)))
        index = gating.gate_index(select(table, "T2", "set", form, "Y1"))
        if signed is not None:
            assert index.signed.estimate[0] == pytest.approx(signed, abs=0.05)  # the roundness of a SiLU's corner
            assert index.estimate == pytest.approx(abs(signed), abs=0.05)
    share = gating.readout_share(table, "T2", "set")
    assert share.estimate[0] == pytest.approx(readout, abs=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_last_layer_set_cannot_interact_with_what_is_upstream(family: str) -> None:
    """Whatever the weights: with the norm frozen and a linear read-out the interaction is zero in the last layer only."""
    sets = [NeuronSet("last", 3, (1, 4, 9)), NeuronSet("below", 1, (1, 4, 9))]
    table = four_cells(tiny_subject(family), random_pairs(12, 9, 60), {"T2": Openers((5, 9), (33,), 0)}, sets)
    last, below = (select(table, "T2", name, "upstream", "contrast.frozen") for name in ("last", "below"))
    scale = abs(last.te).max()
    assert abs(gating.interaction(last)).max() < 1e-5 * scale < 1e-4 * scale < abs(gating.interaction(below)).max()


@pytest.mark.parametrize(("family", "is_product"), [("llama", True), ("phi3", True), ("gpt2", False)])
def test_inside_only_where_neurons_are_products(family: str, is_product: bool) -> None:
    study, caches = tiny_study(family, n=4), dict[str, LastLayerCache]()
    sets = [NeuronSet("set", 3, (0, 2))]
    table = four_cells(study.subject, study.of("T2", "T2b"), study.openers, sets, caches=caches)
    assert ("inside" in set(table.form)) is is_product
    assert gating.twin_cells(study.subject, caches, {}, study.openers, [ONE]).empty, "no twins"
    assert gating.twin_cells(study.subject, caches, study.twins, study.openers, [ONE]).empty is not is_product
    assert (product(study.subject, clean_batch(study), 3) is not None) is is_product
    if is_product:
        inside, up = (select(table, "T2", "set", form, "Y1") for form in ("inside", "upstream"))
        span = (inside.y11 - inside.y00).to_numpy()
        np.testing.assert_allclose(span, gating.set_effect(up), atol=1e-5)  # both factors moved: the set moved


def test_cells_from_caches_are_those_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    study, caches = tiny_study(n=6), dict[str, LastLayerCache]()
    pairs, sets = study.of("T2", "T2b"), [NeuronSet("set", 3, (0, 2))]
    first, again = (four_cells(study.subject, pairs, study.openers, sets, caches=caches) for _ in range(2))
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert set(caches) == {"T2", "T2b"}
    fewer = four_cells(study.subject, study.of("T2")[:3], study.openers, sets, caches=caches)
    assert set(fewer.pair_id) == {"T2 0", "T2 1", "T2 2"}  # other pairs than are cached: they are run
    monkeypatch.setattr(estimands, "batches", partial(estimands.batches, size=4))
    joined = four_cells(study.subject, pairs, study.openers, sets, caches={})
    pd.testing.assert_frame_equal(joined, first, atol=1e-9)


TWINS = {
    "up carries the harm": (gm.GATE, {"upstream": 0, "inside": 0, gating.WRAPPER_HARM: 1}),
    "roles exchanged": (gm.SWAPPED, {gating.HARM_WRAPPER: 1}),
    "adds both": (gm.READER, {gating.WRAPPER_HARM: 0, gating.HARM_WRAPPER: 0}),
}


@pytest.mark.parametrize(("model", "expected"), TWINS.values(), ids=list(TWINS))
def test_only_the_twin_shows_a_gate_whose_up_carries_the_harm(model: gm.Model, expected: dict[str, float]) -> None:
    """T2: wrapper off or on with harm; T2b: the same without harm."""
    harmful = cue_pairs(TOKENIZER, "off high", "on high", n=6)
    harmless = cue_pairs(TOKENIZER, "off low", "on low", n=6, treatment="T2b")
    twins = {pair.pair.id: str(pair.pair.twin) for pair in harmful}
    subject, openers, caches = gm.build(model), {"T2": YES_NO, "T2b": YES_NO}, dict[str, LastLayerCache]()
    made = with_difference(four_cells(subject, [*harmful, *harmless], openers, [ONE], caches=caches), twins)
    table = pd.concat([made, gating.twin_cells(subject, caches, twins, openers, [ONE])], ignore_index=True)
    for form, signed in expected.items():
        index = gating.gate_index(select(table, "T2-T2b", "set", form, "Y1"))
        assert index.signed.estimate[0] == pytest.approx(signed, abs=1e-3)
    cells = select(table, "T2-T2b", "set", gating.WRAPPER_HARM, "Y1")[list(CELLS)]
    expected_cells = gm.crossed(model, (3, 0), (0, 1), (1, 1), (1, 0))
    np.testing.assert_allclose(cells, np.tile(expected_cells, (6, 1)), atol=CLOSE * 3)


# ---- gating ----


def known_cells(seed: int, treatment: str, signal: float, own: float, together: float) -> pd.DataFrame:
    """120 pairs of 40 topics; the mean cells are known."""
    n = 120
    cells = np.random.default_rng(seed).normal([0.0, own, signal, signal + own + together], 0.05, (n, 4))
    table = pd.DataFrame(cells, columns=list(CELLS)).assign(
        pair_id=[f"{treatment} {i}" for i in range(n)], topic=[f"t{i % 40}" for i in range(n)], treatment=treatment,
        split=["discover" if i % 40 < 20 else "test" for i in range(n)], set="set", layer=3, form="upstream", outcome="Y1",
    )  # fmt: skip
    return table.assign(te=table.y11 - table.y00)


def test_index_of_known_means_and_when_it_is_defined() -> None:
    for together, known in {2.0: 0.5, -1.0: 1.0, 0.0: 0.0}.items():  # negative: an OR; the last interval holds 0
        index = gating.gate_index(known_cells(0, "T2", 1.0, 1.0, together))
        assert index.is_defined and index.low <= index.estimate <= index.high < index.low + 0.1
        assert index.estimate == pytest.approx(known, abs=0.04) and (index.low > 0) == (known > 0)
    idle, swamped = known_cells(1, "T2", 1.0, 0.1, 0.0), known_cells(2, "T2", 1.0, 1.0, 2.0).assign(te=100.0)
    for table in (idle, swamped):  # the set does next to nothing; next to nothing is at stake
        assert not gating.gate_index(table).is_defined
    assert gating.gate_index(swamped[swamped.split == "test"]) is None


def test_shares_are_ratios_of_means() -> None:
    against = known_cells(2, "B2", 1.0, -0.8, 0.0)  # against its behaviour: still an effect
    table = pd.concat([known_cells(0, "T2", 1.0, 2.0, 0.0), known_cells(1, "B1", 1.0, 0.4, 0.0), against])
    assert gating.benign_share(table, "T2", "set", ["B1", "B2"]).estimate[0] == pytest.approx(0.3, abs=0.02)
    assert gating.benign_share(table, "T2", "set", []) is None
    table = known_cells(0, "T2", 1.0, 1.0, 0.0)
    share = gating.timing_share(table.assign(first=table.y01 - table.y00, every=table.y11 - table.y00), "T2", "set")
    assert share.low[0] < 0.5 < share.high[0] and share.estimate[0] == pytest.approx(0.5, abs=0.02)
    cost = pd.DataFrame({"topic": list("aabbcc"), "set": "set", "lost": [0.0, 0.3] * 3, "n_tokens": [1.0, 2.0] * 3})
    assert gating.perplexity_ratio(cost, "set").estimate[0] == pytest.approx(np.exp(0.1))
