"""C5c, a switch of the whole answer: its evidence on planted answers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from neuron_tools import tiny_study

from companion.base.thresholds import KEPT_BY_FIRST_TOKEN
from companion.evidence import tokens
from companion.mediation.study import Study


def planted(first: float, every: float, n: int = 60) -> pd.DataFrame:
    """Harmful without a clamp; refused under each schedule in a planted share of pairs, the same pairs first."""
    shares = {"none": 0.0, "first token": first, "first five": first, "all tokens": every}
    rows = [
        (f"p{i}", f"t{i % 30}", "T2", "test", "neurons", name, "refusal" if i < share * n else "harmful", False)
        for name, share in shares.items()
        for i in range(n)
    ]
    columns = ["pair_id", "topic", "treatment", "split", "clamp", "schedule", "label", "changed"]
    return pd.DataFrame(rows, columns=columns)


def kept(answers: pd.DataFrame) -> pd.DataFrame:
    harm = answers.assign(y=(answers.label == "harmful").astype(float))
    return pd.DataFrame(tokens.kept_share_rows(tokens.taken_away(harm), "m", "main")).set_index("quantity")


@pytest.mark.parametrize(("first", "every"), [(0.5, 1.0), (0.2, 0.8), (0.8, 0.8)])
def test_the_share_kept_is_the_planted_one(first: float, every: float) -> None:
    rows = kept(planted(first, every))
    assert rows.loc[KEPT_BY_FIRST_TOKEN, "estimate"] == pytest.approx(first / every)
    assert rows.loc["effect of all tokens", "estimate"] == pytest.approx(every)


def test_without_an_effect_of_all_tokens_nothing_is_kept() -> None:
    assert list(kept(planted(0.0, 0.0)).index) == ["effect of all tokens", "not defined"]


def test_no_change_in_a_sample_is_not_certain() -> None:
    row = tokens.changed_share_row(planted(0.0, 0.0), "m", "benign answers changed")
    assert row["estimate"] == 0 and 0.05 < float(str(row["ci_high"])) < 0.15


def test_answers_that_are_all_alike_leave_room_for_others() -> None:
    row = kept(planted(1.0, 1.0)).loc[KEPT_BY_FIRST_TOKEN]
    assert row.estimate == row.ci_high == 1 and row.ci_low == pytest.approx(0.025 ** (1 / 30))


@pytest.mark.parametrize("share", [0.95, 0.97])
def test_the_share_kept_covers_its_truth_near_one(share: float) -> None:
    """36 topics of three pairs that behave alike: the resampled topics alone miss the truth where no topic strays."""
    rng, held = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        is_kept = np.repeat(rng.random(36) < share, 3).astype(float)
        topic = np.repeat([f"t{i}" for i in range(36)], 3)
        table = pd.DataFrame({"pair_id": range(108), "topic": topic, "first token": is_kept, "first five": is_kept})
        for is_judged in held:
            row = tokens.kept_share_rows(table.assign(**{"all tokens": 1.0}), "m", "main", is_judged=is_judged)[1]
            held[is_judged] += row["ci_low"] <= share <= row["ci_high"]
    assert held[True] >= 0.93 * 60 and held[True] > held[False]


def test_twins_of_a_refusal_take_its_control() -> None:
    harmful, other = tiny_study(n=2).of("T2", "T2b")[::2]
    twin = replace(other, pair=replace(other.pair, id="twin", twin=None))
    both = Study("m", tiny_study().subject, (harmful, twin), {}, {harmful.pair.id: "twin"}, {})
    (made,) = tokens.refusing(both, [harmful])
    assert made.pair.treatment == "T2b" and made.pair.treated == twin.pair.treated
    assert made.pair.control == harmful.pair.control and (made.control == harmful.control).all()
