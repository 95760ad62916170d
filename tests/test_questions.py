"""The open questions: the key follows from how things are made, and what a student would measure agrees with it."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pandas as pd
import pytest

from companion.base.thresholds import EARLY, LATE, depth
from companion.mediation import estimands, outcomes, study
from companion.mediation.study import Study
from companion.neurons import single
from companion.prompts import pairs
from exercises import mystery
from exercises.judging import NUMBERS
from exercises.questions import QUESTIONS
from organisms import compiled

CODES = range(6)


@pytest.fixture(scope="module", autouse=True)
def made_once() -> Iterator[None]:
    """Questions share compiled models and the embedded prompt set: each is made once for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "draw", cache(compiled.draw))
        patch.setattr(pairs, "load_set", cache(pairs.load_set))
        yield


def test_every_question_has_a_key_of_three_letters_that_the_code_shuffles() -> None:
    assert set(mystery.keys()) == set(QUESTIONS) == set(NUMBERS)
    for number in NUMBERS:
        found = [mystery.key(number, code) for code in CODES]
        assert all(set(one) == set(mystery.LETTERS) for one in found)
        assert len({tuple(one.values()) for one in found}) > 1, f"{number} has the same key for every class"


@pytest.mark.parametrize("code", CODES)
def test_00_the_sign_of_the_interaction_tells(code: int) -> None:
    table = mystery.cells(code)
    interaction = (table.y11 - table.y10 - table.y01 + table.y00).groupby(table.mediator).mean()
    names = np.select([interaction > 1, interaction < -1], mystery.NATURES["00"][1:], mystery.NATURES["00"][0])
    assert dict(zip(interaction.index, names, strict=True)) == mystery.key("00", code)


@pytest.mark.parametrize("code", CODES)
def test_01_topics_and_wrapper_words_tell(code: int) -> None:
    for letter, drawn in mystery.prompt_sets(code).items():
        splits = pd.Series([pair.split for pair in drawn]).groupby([pair.topic for pair in drawn]).nunique()
        neutral_is_treated = any(" simple " in pair.treated for pair in drawn)
        says = mystery.NATURES["01"][1 if splits.max() > 1 else 2 if neutral_is_treated else 0]
        assert says == mystery.key("01", code)[letter]


def direct(one: Study, site: str) -> pd.Series:
    wanted = estimands.mediators(one.subject, [site])
    table = estimands.measure_effects(one.subject, one.of("T2"), one.openers, wanted)
    return table.groupby("layer").nie0.mean()


def decided(one: Study) -> str:
    effect = direct(one, "mlp_out.direct")
    at = depth(int(effect.idxmax()), one.subject.n_layers)
    return "early" if at < EARLY else "late" if at > LATE else "middle"


def writer(one: Study) -> str:
    return "mlp" if direct(one, "mlp_out.direct").max() > direct(one, "attn_out.direct").max() else "attention"


def neighbours(one: Study) -> str:
    columns = single.all_neurons(one.subject, [one.subject.n_layers - 1])
    table = single.neuron_table(single.measure_chosen(one, "T2", columns)[0])
    effect = table.groupby("neuron").nie0.mean().abs()
    large = np.flatnonzero(effect > 0.02 * effect.sum())
    gaps = np.diff(large)
    return mystery.NATURES["04"][2 if len(large) <= 8 else 0 if np.median(gaps) <= 2 else 1]


def fetched(one: Study) -> str:
    wanted = estimands.mediators(one.subject, ["resid_post"], ["differ"])
    table = estimands.measure_effects(one.subject, one.of("T2"), one.openers, wanted)
    share = table.groupby("layer").nie0.sum() / table.groupby("layer").te.sum()
    return f"layer {share.index[share < 0.5][0]}"


@pytest.mark.parametrize(("number", "measured"), [("02", decided), ("03", writer), ("04", neighbours), ("05", fetched)])
def test_02_to_05_what_one_measures_is_what_was_built(number: str, measured: Callable[[Study], str]) -> None:
    models = mystery.models(number, 1)
    assert [f"{one.slug} {one.subject.name}" for one in models.values()] == [
        "A A",
        "B B",
        "C C",
    ]  # no name gives it away
    assert {letter: measured(one) for letter, one in models.items()} == mystery.key(number, 1)


def test_06_half_of_a_vector_moves_the_outcome_its_way() -> None:
    this = study.begin("embedded", "embedded", "embedded", profile="smoke")
    batch = estimands.run_clean(this.subject, estimands.batches(this.of("T2"), this.subject)[0])
    last, openers = batch.treated.resid_post[-1][:, -1], this.openers["T2"]
    plain = outcomes.log_odds(this.subject, last, openers)
    moved: dict[str, float] = {}
    for letter, vector in mystery.vectors(this, 1).items():
        moved[letter] = float((outcomes.log_odds(this.subject, last + vector / 2, openers) - plain).mean())
    names = ("towards refusing", "neither", "towards complying")
    assert dict(zip(sorted(moved, key=moved.__getitem__), names, strict=True)) == mystery.key("06", 1), moved


@pytest.mark.parametrize("code", (0, 1))
def test_07_a_trained_part_shows_beside_a_model_in_which_everything_was_trained(code: int) -> None:
    tables = mystery.plants(code)
    more = {letter: table - tables["whole"] for letter, table in tables.items() if letter != "whole"}
    writes, passes = more["A"].columns.sort_values(ascending=False)
    says = {}
    for letter, table in more.items():
        attention, middle = table.index.str.startswith("attn"), table.index.str.endswith("middle")
        late = "last third" if table.loc[middle, passes].sum() < -0.05 else "first third"
        says[letter] = "attention" if table.loc[attention, writes].sum() > 0.2 else late
    assert says == mystery.key("07", code)


@pytest.mark.parametrize("code", (0, 1))
def test_08_the_ledger_agrees_with_the_key(code: int) -> None:
    found = {letter: mystery.verdict(table) for letter, table in mystery.evidence(code).items()}
    assert found == mystery.key("08", code)
