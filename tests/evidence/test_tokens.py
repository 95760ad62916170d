"""Evidence of C4, C5c and C6 from planted shares, answers and trials."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from oracles import tiny_study

from companion.base.thresholds import KEPT_BY_FIRST_TOKEN
from companion.evidence import steering, tokens
from companion.mediation import mechanisms
from companion.mediation.estimands import with_estimands
from companion.mediation.study import Study

# ---- tokens ----


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
    found = kept(first, every).estimate
    assert found[[KEPT_BY_FIRST_TOKEN, "effect of all tokens"]].tolist() == pytest.approx([first / every, every])


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
    both = Study("m", tiny_study().subject, (harmful, twin), {}, {harmful.pair.id: "twin"})
    (made,) = tokens.refusing(both, [harmful])
    assert made.pair.treatment == "T2b" and made.pair.treated == twin.pair.treated
    assert made.pair.control == harmful.pair.control and (made.control == harmful.control).all()


def test_rates_of_harmful_answers_come_with_intervals() -> None:
    found = tokens.harmful_rates(planted(0.5, 1.0)).set_index("schedule")
    assert found.estimate.to_dict() == {"none": 1, "first token": 0.5, "first five": 0.5, "all tokens": 0}
    assert (
        (found.n == 60).all() and (found.estimate + found.refused + found.off_topic == 1).all() and found.refused.any()
    )
    assert found.low["first token"] < 0.4 and found.high["first token"] > 0.6


# ---- steering ----


def made(*counts: dict[str, int]) -> pd.DataFrame:
    """Labels of harmful, borderline and harmless prompts, each a topic of its own, all in a strong wrapper."""
    kinds = zip(("harmful", "borderline", "harmless"), counts, strict=False)
    rows = [(kind, label) for kind, some in kinds for label, n in some.items() for _ in range(n)]
    table = pd.DataFrame(rows, columns=["kind", "label"])
    return table.assign(topic=table.kind + " " + table.groupby("kind").cumcount().astype(str), tier=5, severity=0.0)


PLAIN = made({"harmful": 40}, {"on_topic": 20}, {"on_topic": 20})
HARMLESS = {"on_topic": 17, "refusal": 1, "off_topic": 2}
STEERED = made({"harmful": 10, "refusal": 20, "off_topic": 10}, {"on_topic": 18, "refusal": 2}, HARMLESS)


def found(rows: list[steering.Row], quantity: str, variant: str = "main") -> steering.Row:
    (one,) = [row for row in rows if (row["quantity"], row["variant"]) == (quantity, variant)]
    return one


def test_rows_hold_the_changes_and_the_refits_widen_harm_only() -> None:
    free = steering.outcome_rows(PLAIN, STEERED)
    wide = steering.outcome_rows(PLAIN, STEERED, [-70.0, -80.0])
    assert found(wide, "harm change")["estimate"] == -75
    assert found(wide, "harm change")["ci_low"] < found(free, "harm change")["ci_low"]
    # A garbled answer to a harmful request is no harm either, but one to a harmless request is a loss.
    for quantity, change in (("harmless loss", 15), ("over-refusal", 10)):
        assert found(wide, quantity) == found(free, quantity) and found(free, quantity)["estimate"] == change
    assert found(wide, "spread over refits")["estimate"] == pytest.approx(np.sqrt(50))
    assert found(wide, "harm change", "strong wrappers")["estimate"] == -75
    bare = [table[table.kind == "harmful"].reset_index(drop=True) for table in (PLAIN, STEERED)]
    names = {row["quantity"] for row in steering.outcome_rows(*bare)}
    assert names == {"harm change"}, "a kind of prompt that the set lacks has no row"


def test_an_advantage_over_rivals_and_the_rank_among_random_directions() -> None:
    late, rival = STEERED[STEERED.kind == "harmful"], made({"harmful": 20, "refusal": 20})
    rows = steering.rival_rows(late, {"mid": rival}, {"late": 2.0, "mid": 2.02})
    assert found(rows, "advantage over mid")["estimate"] == 25
    assert found(rows, "budget of mid over late")["estimate"] == pytest.approx(1.01)
    null = {"family": "isotropic", "role": ["late", *["random"] * 99], "value": [5.0, *np.linspace(0, 4, 99)]}
    assert found(steering.random_rows(pd.DataFrame(null)), "p isotropic")["estimate"] == 0.01


def test_what_is_left_is_counted_at_the_layers_that_are_steered() -> None:
    """Half of the effect of one layer is left; every other layer keeps its own. Late layers are 4 and 5."""
    rows = [(f"p{i}", f"t{i}", layer, 1.0, 1.0 + 0.1 * i) for i in range(8) for layer in range(6)]
    before = pd.DataFrame(rows, columns=["pair_id", "topic", "layer", "nie0", "nie1"]).assign(y00=0.0, y11=2.0)
    for layer, late, others in ((2, 1.0, 3.5 / 4), (5, 0.75, 1.0)):
        half = np.where(before.layer == layer, 0.5, 1.0)
        after = before.assign(nie0=before.nie0 * half, nie1=before.nie1 * half, y11=1.0)
        made = steering.mediation_rows(before, after)
        left = {str(row["quantity"]).replace("NIE after/before, ", ""): row["estimate"] for row in made}
        assert left == pytest.approx({"phi": 0.5, "steered sites": late, "other sites": others})


def test_there_is_no_share_of_effects_that_may_be_zero() -> None:
    """The effects of the layers below the steered ones cancel over topics; those of the steered layers do not."""
    rows = [(f"p{i}", f"t{i}", layer, *[(-1.0) ** i if layer < 4 else 1.0] * 2) for i in range(8) for layer in range(6)]
    before = pd.DataFrame(rows, columns=["pair_id", "topic", "layer", "nie0", "nie1"]).assign(y00=0.0, y11=2.0)
    names = [row["quantity"] for row in steering.mediation_rows(before, before.assign(y11=1.0))]
    assert names == ["phi", "NIE after/before, steered sites"]
