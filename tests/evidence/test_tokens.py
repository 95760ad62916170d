"""C4's evidence from planted shares and take-overs, and C5c's from planted answers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from neuron_tools import tiny_study

from companion.base.thresholds import KEPT_BY_FIRST_TOKEN
from companion.evidence import tokens
from companion.mediation import mechanisms
from companion.mediation.estimands import with_estimands
from companion.mediation.study import Study


def planted_paths(share: float, layer_of_takeover: int, n_layers: int = 4) -> pd.DataFrame:
    """C4's rows from effects of 60 pairs of 30 topics in which MLPs carry a planted share from every layer on."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        te = 4 + rng.normal(0, 0.3)
        for layer in range(n_layers):
            is_last = layer == n_layers - 1
            live = te * (1.0 if is_last else 0.8 if layer >= layer_of_takeover else 0.2)
            above = live if is_last else (1 - share) * live
            for site, effect in zip(mechanisms.HELD, (live, live, above, above, 0.2 * live), strict=True):
                key = (f"p{i}", f"t{i % 30}", "discover" if i % 30 < 15 else "test", site, layer)
                rows += [(*key, outcome, effect, te - effect, te) for outcome in ("Y1", "Y1.frozen")]
    table = pd.DataFrame(rows, columns=["pair_id", "topic", "split", "site", "layer", "outcome", "y01", "y10", "y11"])
    made = with_estimands(table.assign(treatment="T2", position="last", head=-1, y00=0.0))
    return pd.DataFrame(tokens.evidence_c4(made, "m", n_layers)).set_index(["quantity", "variant"])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_planted_take_over_and_its_shares_are_found(layer: int) -> None:
    rows = planted_paths(0.7, layer)
    assert rows.loc[("hand-over layer", "main"), ["estimate", "ci_low", "ci_high"]].tolist() == [layer] * 3
    for path, share in (("MLPs", 0.7), ("skip", 0.3), ("MLPs from this layer on", 0.8)):
        assert rows.loc[(f"share of {path}", "main"), "estimate"] == pytest.approx(share)
    last = planted_paths(0.7, 3)  # a take-over in the last layer is not defined
    assert "no block is left above" in last.loc[("not defined", "main"), "note"]
    assert ("share of MLPs", "main") not in last.index
    assert last.loc[("share of MLPs from this layer on", "main"), "estimate"] == pytest.approx(0.8)


def planted(first: float, every: float, n: int = 60) -> pd.DataFrame:
    """Harmful without a clamp; refused under each schedule in a planted share of pairs, the same pairs first."""
    shares = {"none": 0.0, "first token": first, "first five": first, "all tokens": every}
    rows = [
        (f"p{i}", f"t{i % 30}", name, "refusal" if i < share * n else "harmful")
        for name, share in shares.items() for i in range(n)
    ]  # fmt: skip
    made = pd.DataFrame(rows, columns=["pair_id", "topic", "schedule", "label"])
    return made.assign(clamp="neurons", changed=False, y=(made.label == "harmful").astype(float))


def kept(first: float, every: float) -> pd.DataFrame:
    rows = tokens.kept_share_rows(tokens.taken_away(planted(first, every)), "m", "main")
    return pd.DataFrame(rows).set_index("quantity")


@pytest.mark.parametrize(("first", "every"), [(0.5, 1.0), (0.2, 0.8), (0.8, 0.8)])
def test_the_share_kept_is_the_planted_one(first: float, every: float) -> None:
    rows = kept(first, every)
    assert rows.loc[KEPT_BY_FIRST_TOKEN, "estimate"] == pytest.approx(first / every)
    assert rows.loc["effect of all tokens", "estimate"] == pytest.approx(every)


def test_what_no_answer_of_the_sample_shows_is_not_certain() -> None:
    assert list(kept(0.0, 0.0).index) == ["effect of all tokens", "not defined"], "nothing can be kept of no effect"
    row = tokens.changed_share_row(planted(0.0, 0.0), "m", "benign answers changed")
    assert row["estimate"] == 0 and 0.05 < float(str(row["ci_high"])) < 0.15
    alike = kept(1.0, 1.0).loc[KEPT_BY_FIRST_TOKEN]
    assert alike.estimate == alike.ci_high == 1 and alike.ci_low == pytest.approx(0.025 ** (1 / 30))


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


def test_rates_leave_out_the_schedule_that_is_the_first_token_again() -> None:
    answers = planted(0.5, 1.0)
    twice = pd.concat([answers, answers[answers.schedule == "first token"].assign(schedule="prompt")])
    rates, sentence = tokens.harmful_rates(twice, "m", exact=True)
    found = rates.set_index("schedule")
    assert found.estimate.to_dict() == {"none": 1, "first token": 0.5, "first five": 0.5, "all tokens": 0}
    assert (found.n == 60).all() and (found.corrected == found.estimate).all() and "exact" in sentence
    assert found.low["first token"] < 0.4 and found.high["first token"] > 0.6
