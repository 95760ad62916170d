"""Gate or contributor: every test on hand-made models whose effects plain arithmetic knows."""

import gate_models as gm
import numpy as np
import pandas as pd
import pytest
from families import tiny_subject
from handmade import cue_pairs, random_pairs, word_tokenizer

from companion.mediation import estimands
from companion.mediation.estimands import with_difference
from companion.neurons import clamping, gating
from companion.neurons.clamping import CELLS, NeuronSet
from companion.prompts.tokens import Openers, TokenPair

TOKENIZER = word_tokenizer()
YES_NO = Openers(*((TOKENIZER.convert_tokens_to_ids(word),) for word in ("yes", "no")), 0)
BITS = {"off low": (0, 0), "on low": (1, 0), "off high": (0, 1), "on high": (1, 1)}
CLOSE = 2e-4  # what a constant channel of 1000 leaves of the norm

# name, model, the neuron tested, control and treated cues, the signed indices upstream and inside (None: any), readout
CASES = [
    ("additive", gm.ADDITIVE, (3, 0), "off low", "on low", 0.0, 0.0, 1.0),
    ("gated inside a neuron", gm.INSIDE, (3, 0), "off low", "on high", 0.0, 2 / 3, 1.0),
    ("one factor moves", gm.INSIDE, (3, 0), "off low", "on low", 0.0, 0.0, 1.0),
    ("gated below", gm.BELOW, (2, 0), "off low", "on high", 1.0, 0.0, 0.0),
    ("and", gm.AND, (2, 0), "off low", "on high", 1.0, None, 0.0),
    ("or", gm.OR, (2, 0), "off low", "on high", -1.0, None, 0.0),
    ("mixed", gm.MIXED, (2, 0), "off low", "on low", 0.0, 0.0, 0.25),
]
case = pytest.mark.parametrize("made", CASES, ids=[made[0] for made in CASES])


def pairs(control: str, treated: str) -> list[TokenPair]:
    return cue_pairs(TOKENIZER, control, treated, n=6)


def measured(model: gm.Model, at: tuple[int, int], control: str, treated: str) -> pd.DataFrame:
    one = NeuronSet("set", at[0], (at[1],))
    return clamping.cells(gm.build(model), pairs(control, treated), {"T2": YES_NO}, [one])


@case
def test_cells_are_those_of_plain_arithmetic(made: tuple) -> None:
    _, model, at, control, treated, *_ = made
    table = measured(model, at, control, treated)
    bits = (BITS[control], BITS[treated])
    for form, expected in (("upstream", gm.upstream(model, at, bits)), ("inside", gm.inside(model, at, bits))):
        for outcome in ("Y1", "Y1.frozen"):
            part = gating.select(table, "T2", "set", form, outcome)
            assert len(part) == 6
            np.testing.assert_allclose(
                part[list(CELLS)], np.tile(expected, (6, 1)), atol=CLOSE * max(map(abs, expected))
            )


@case
def test_index_and_readout_are_the_closed_form(made: tuple) -> None:
    _, model, at, control, treated, upstream, inside, readout = made
    table = measured(model, at, control, treated)
    for form, expected in (("upstream", upstream), ("inside", inside)):
        index = gating.gate_index(gating.select(table, "T2", "set", form, "Y1"))
        assert index is not None
        if expected is not None:
            assert index.signed.estimate[0] == pytest.approx(expected, abs=0.05)  # the roundness of a SiLU's corner
            assert index.estimate == pytest.approx(abs(expected), abs=0.05)
    share = gating.readout_share(table, "T2", "set")
    assert share is not None and share.estimate[0] == pytest.approx(readout, abs=0.01)


def test_a_last_layer_set_cannot_interact_with_what_is_upstream() -> None:
    """Whatever the weights: with the norm frozen and a linear read-out the interaction is zero in the last layer only."""
    for family in ("llama", "gpt2", "phi3"):
        subject = tiny_subject(family)
        made = random_pairs(12, 9, 60)
        sets = [NeuronSet("last", 3, (1, 4, 9)), NeuronSet("below", 1, (1, 4, 9))]
        table = clamping.cells(subject, made, {"T2": Openers((5, 9), (33,), 0)}, sets)
        linear = table[(table.form == "upstream") & (table.outcome == "contrast.frozen")]
        interaction = (
            (linear.y11 - linear.y10 - linear.y01 + linear.y00).groupby(linear["set"]).apply(lambda x: abs(x).max())
        )
        scale = abs(linear.te).max()
        assert interaction["last"] < 1e-5 * scale < 1e-4 * scale < interaction["below"]


@pytest.mark.parametrize(("family", "is_product"), [("llama", True), ("phi3", True), ("gpt2", False)])
def test_inside_only_where_neurons_are_products(family: str, is_product: bool) -> None:
    subject = tiny_subject(family)
    group = random_pairs(4, 9, 60)
    table = clamping.cells(subject, group, {"T2": Openers((5,), (33,), 0)}, [NeuronSet("set", 3, (0, 2))])
    assert ("inside" in set(table.form)) is is_product
    if is_product:
        inside, up = (gating.select(table, "T2", "set", form, "Y1") for form in ("inside", "upstream"))
        span = (inside.y11 - inside.y00).to_numpy()
        np.testing.assert_allclose(span, gating.set_effect(up), atol=1e-5)  # both factors moved: the set moved
    batch = estimands.run_clean(subject, group)
    assert (clamping.product(subject, batch, 3) is not None) is is_product


def test_absolute_interval_holds_zero_where_the_signed_one_does() -> None:
    assert gating.absolute(0.3, -0.1, 0.7) == (0.3, 0.0, 0.7)
    assert gating.absolute(-0.3, -0.7, 0.1) == (0.3, 0.0, 0.7)
    assert gating.absolute(0.3, 0.1, 0.4) == (0.3, 0.1, 0.4)


def synthetic(rng: np.random.Generator, treatment: str, signal: float, own: float, together: float) -> pd.DataFrame:
    """120 pairs of 40 topics; the mean cells are known."""
    n = 120
    noise = rng.normal(0, 0.05, (n, 4))
    means = np.array([0.0, own, signal, signal + own + together])
    table = pd.DataFrame(means + noise, columns=list(CELLS)).assign(
        pair_id=[f"{treatment} {i}" for i in range(n)], topic=[f"t{i % 40}" for i in range(n)], treatment=treatment,
        split=["discover" if i % 40 < 20 else "test" for i in range(n)], set="set", layer=3, form="upstream", outcome="Y1",
    )  # fmt: skip
    return table.assign(te=table.y11 - table.y00)


def test_index_of_known_means_and_when_it_is_defined() -> None:
    rng = np.random.default_rng(0)
    index = gating.gate_index(synthetic(rng, "T2", 1.0, 1.0, 2.0))
    assert index is not None and index.is_defined and index.low < 0.5 < index.high
    assert index.estimate == pytest.approx(0.5, abs=0.02) and index.high - index.low < 0.1
    idle = gating.gate_index(synthetic(rng, "T2", 1.0, 0.1, 0.0))
    assert idle is not None and not idle.is_defined  # the set does next to nothing
    swamped = synthetic(rng, "T2", 1.0, 1.0, 2.0).assign(te=100.0)
    small = gating.gate_index(swamped)
    assert small is not None and not small.is_defined  # next to nothing is at stake
    assert gating.gate_index(swamped[swamped.split == "test"]) is None


def test_benign_share_of_known_means() -> None:
    rng = np.random.default_rng(1)
    table = pd.concat(
        [
            synthetic(rng, "T2", 1.0, 2.0, 0.0),
            synthetic(rng, "B1", 1.0, 0.4, 0.0),
            synthetic(rng, "B2", 1.0, -0.8, 0.0),  # against its behaviour: still an effect
        ]
    )
    share = gating.benign_share(table, "T2", "set", ["B1", "B2"])
    assert share is not None and share.estimate[0] == pytest.approx(0.3, abs=0.02)
    assert gating.benign_share(table, "T2", "set", []) is None


def test_difference_subtracts_cells_of_the_twin() -> None:
    rng = np.random.default_rng(2)
    harm, twin = synthetic(rng, "T2", 1.0, 1.0, 2.0), synthetic(rng, "T2b", 0.5, 0.5, 0.0)
    twins = {f"T2 {i}": f"T2b {i}" for i in range(120)}
    both = with_difference(pd.concat([harm, twin], ignore_index=True), twins)
    made = both[both.treatment == "T2-T2b"].set_index("pair_id")
    np.testing.assert_allclose(made.y11, harm.y11.to_numpy() - twin.y11.to_numpy())
    np.testing.assert_allclose(made.te, harm.te.to_numpy() - twin.te.to_numpy())
    index = gating.gate_index(made.reset_index())
    assert index is not None and index.estimate == pytest.approx(2 / 3, abs=0.03)
