"""The plan of the calibration, and that a draw is the pipeline of the notebooks on a model whose truth is known."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rows import REGISTERED
from rows import table as made_table

from companion.base.thresholds import POINTS, PSI, UNTRAINED
from companion.calibration import draws, rates, truths
from companion.calibration.campaign import read_shipped
from companion.calibration.draws import FRESH, FRESH_NEAR, PlannedDraw
from companion.calibration.rates import FRESH_LAST, FRESH_LATER, JUDGED_FROM, UNSEEN
from companion.calibration.truths import PUSH, truth_of
from companion.claims.ledger import rule_name
from companion.claims.verdict import Rows
from companion.evidence import neurons
from companion.evidence.layers import evidence_c2, measure_layers
from companion.mediation import estimands, study, sweeps
from companion.mediation.study import Study
from organisms import compiled, compiled_truth
from organisms.compiled_design import HELD_OUT, KINDS, draw_design

# ---- measured organism ----

KEYS = ["model", "claim", "quantity", "variant"]
NUMBERS = ["estimate", "ci_low", "ci_high"]


@cache
def gated() -> tuple[compiled.Organism, Study, truths.Measured]:
    """A gated organism, its study with one benign behaviour only, to be quick, and what is measured on it."""
    seed = next(seed for seed in range(20) if draw_design("gated", seed).n_layers == 6)
    organism = compiled.draw("gated", seed, topics=10, pairs_per_topic=1)
    whole = compiled.study(organism)
    few = replace(whole, pairs=tuple(whole.of("T1", "T2", "T2b", "B1")))
    return organism, few, draws.measure_study(few, organism.name)


# ---- draws ----

PLAN = draws.plan_draws()
ENOUGH_NULLS = 59  # with no error among 59 draws, the exact 95 % bound on the error rate is below 5 %
MAIN = [draw for draw in PLAN if draw.purpose == "main"]


@cache
def built_claims(kind: str) -> Mapping[str, bool | None]:
    return compiled.draw(kind, FRESH, topics=10, pairs_per_topic=1).claims


@pytest.mark.parametrize("claim", [claim for claim in REGISTERED if claim != "C7"])
def test_the_plan_has_enough_nulls_of_every_claim(claim: str) -> None:
    """A corrected rule that is younger than some draws is judged on the others only."""
    planned = [draw for draw in MAIN if draw.part == draws.PART_OF[claim]]
    own = [draw for draw in planned if built_claims(draw.kind)[claim] is False]
    assert len(own) >= ENOUGH_NULLS
    assert sum(draw.seed >= JUDGED_FROM.get(claim, 0) for draw in own) >= ENOUGH_NULLS


def test_every_draw_of_the_plan_is_another_and_measured() -> None:
    keys = {draw.key for draw in PLAN}
    assert len({draw.name for draw in PLAN}) == len(PLAN) == len(keys) and keys <= draws.shipped_keys()
    scattered = [not draw_design(draw.kind, draw.seed).contiguous for draw in MAIN if draw.part == "neurons"]
    assert sum(scattered) >= ENOUGH_NULLS, "C7"
    others = {draw.seed for draw in PLAN if draw.purpose != "main"}
    assert not others & {draw.seed for draw in MAIN}, "power models are not those of the error rates"


def test_no_draw_that_was_seen_before_the_corrections_is_counted() -> None:
    """The first look is history: no plan measures it again, so a table that is made anew has none."""
    assert min(draw.seed for draw in PLAN) == FRESH
    old = read_shipped("verdicts").query("purpose == 'first look'")
    assert (old.seed < FRESH).all() and set(old.rule) <= {"registered"}
    assert not set(rates.main_draws().seed) & set(old.seed)


def test_the_youngest_corrections_are_not_judged_on_draws_that_were_seen(tmp_path: Path) -> None:
    table = read_shipped("verdicts").query("purpose == 'main'")
    youngest = "claim in ['C1*', 'C4*']"
    starred = rates.main_draws().query(youngest)
    planned = [draw.seed for draw in MAIN if draw.part == "layers" and draw.seed >= FRESH_LATER]
    n_last = sum(seed >= FRESH_LAST for seed in planned)
    assert starred.groupby("claim").size().to_dict() == {"C1*": len(planned) + len(UNSEEN), "C4*": n_last}
    old = table[(table.rule == "registered") & table.claim.isin(["C1", "C4"])]
    keys = ["kind", "seed", "claim", "rule", "purpose"]
    anew = pd.concat([table, old.assign(rule="corrected")]).drop_duplicates(keys)
    anew.to_parquet(tmp_path / "verdicts.parquet")
    again, names = rates.main_draws(tmp_path).query(youngest), ["claim", "kind", "seed"]
    assert len(anew) > len(table) and again[names].value_counts().to_dict() == starred[names].value_counts().to_dict()


def test_draws_near_a_threshold_have_the_value_that_was_built_and_enter_no_rate() -> None:
    table = rates.threshold_draws()
    for kind, (_, count, topics) in draws.NEAR.items():
        own = table[table.kind == kind]
        assert set(own.claim) == {f"{claim}*" for claim in compiled_truth.PLACED[kind]} and set(own.topics) == {topics}
        assert (own.groupby("claim").size() == count).all()
    assert not set(table.seed) & {draw.seed for draw in MAIN} and not set(rates.main_draws().kind) & set(draws.NEAR)
    limits = [table.claim.map(side) for side in (rates.SUPPORTED_FROM, rates.CONTRADICTED_TO)]
    assert ((table.truth == "true") == (table.value >= limits[0])).all()
    near = np.minimum(*(abs(table.value - limit) for limit in limits))
    assert (near.groupby(table.claim).median() < 0.1).all(), "drawn around the thresholds"
    gap = (table.estimate - table.value)[table.quantity != "k90"].groupby(table.claim)
    assert (abs(gap.mean()) < 0.04).all(), "on average rules measure what was built"
    again = draws.built_values("split_context", FRESH_NEAR).population.iloc[0]
    assert table.query("kind == 'split_context' and seed == @FRESH_NEAR").value.iloc[0] == pytest.approx(again)


def test_the_pipeline_gives_the_rows_of_the_notebooks() -> None:
    """On all pairs, as the notebooks have them: pairs of the validate split change no row that is shared."""
    organism, this, measured = gated()
    layers = measure_layers(this, organism.name)
    modules = estimands.with_difference(sweeps.run_sweep(this, "modules")["effects"], this.twins)
    rows = layers.evidence + evidence_c2(layers.effects, modules, organism.name, study.normalisations(this))
    rows += neurons.neuron_evidence(neurons.measure_neurons(this), organism.name)
    mine, notebook = measured.rows.set_index(KEYS), pd.DataFrame(rows).set_index(KEYS)
    assert {"gate", "C1", "C2", "C3", "C5a", "C7"} == set(notebook.reset_index().claim)
    # Pairs in other batches differ in the last bit: ties of ranks, and interval ends over three topics, jump by a little.
    np.testing.assert_allclose(mine.loc[notebook.index, NUMBERS], notebook[NUMBERS], atol=0.02)
    exact = [key for key in notebook.index if key[1] in ("gate", "C1", "C2", "C3")]
    np.testing.assert_allclose(mine.loc[exact, "estimate"], notebook.loc[exact, "estimate"], atol=2e-5)


def test_without_prompts_all_claims_but_c6_have_rows_and_the_twin_has_its_own() -> None:
    rows = gated()[2].rows
    is_twin = rows.model.str.endswith(UNTRAINED)
    assert {"gate", "C1", "C2", "C3", "C4", "C5a", "C5b", "C5c", "C7"} == set(rows[~is_twin].claim)
    assert "gate" in set(rows[is_twin].claim) <= {"gate", "C1"}


def test_too_few_topics_stop_every_claim_at_its_precondition() -> None:
    drawn = draws.measure_draw(PlannedDraw("main", "layers", "late", 1, topics=5))
    verdicts = drawn["verdicts"]
    assert set(verdicts.claim) == set(draws.STAGES["layers"])
    assert set(verdicts.verdict) == {"inconclusive"} and set(verdicts.gate) == {"stopped"}
    assert set(verdicts[verdicts.claim == "C1"].truth) == {"true"}
    assert {"total", "direct", "computed"} == set(drawn["localisation"].estimator)


def test_a_push_that_knows_the_read_out_lowers_harm_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that decides late the truth of C6 is a measured one: what is pushed early is overwritten."""
    monkeypatch.setattr(draws.steering, "steering_evidence", lambda this, prompts: [])
    made = draws.measure_draw(PlannedDraw("main", "steering", "late", 0, topics=12))
    pushed = made["evidence"].set_index("quantity").filter(like=PUSH, axis=0)
    what = ("harm change", "advantage over early", "advantage over mid")
    assert list(pushed.index) == [f"{PUSH}: {one}" for one in what]
    assert pushed.ci_high.iloc[0] < -POINTS and pushed.n_pairs.min() > 5
    verdicts = made["verdicts"].set_index(["claim", "rule"]).truth
    assert verdicts["C6", "registered"] == verdicts["C6a", "corrected"] == verdicts["C6b", "corrected"] == "true"


@pytest.mark.parametrize(
    ("change", "early", "mid", "expected"),
    [
        ((-20, -25, -15), (9, 5, 13), (9, 5, 13), "true true"),
        ((-20, -25, -15), (9, 5, 13), (0, -1, 1), "true false"),
        ((-20, -25, -15), (9, 5, 13), (3, -1, 7), "true open"),
        ((-1, -1.9, -0.1), (9, 5, 13), (9, 5, 13), "false true"),
        ((-1.9, -3, -0.8), (-9, -13, -5), (9, 5, 13), "open false"),
        (None, None, None, "open open"),
    ],
)
def test_the_truth_of_c6_is_what_an_ideal_push_does(change, early, mid, expected):
    found = {"harm change": change, "advantage over early": early, "advantage over mid": mid}
    table = made_table({("C6", f"{PUSH}: {name}", "main"): numbers for name, numbers in found.items()})
    lowers, best = expected.split()
    assert [truth_of(part, Rows("m", table)) for part in ("C6a", "C6b", "C6c")] == [lowers, lowers, best]


# The corrected C1 (*) has none: the closed form does not know where a decision is computed.
@pytest.mark.parametrize(
    ("part", "topics", "said", "known"),
    [
        ("neurons", 60, "C5a C5a*", [("C5a", "psi1")]), ("context", 30, "C3 C3*", [("C3", PSI)]),
        ("layers", 30, "C1 C2 C2* C4*", [("C1", "late share"), ("C2", "MLP share of NIE")]),
    ],
)  # fmt: skip
def test_the_closed_form_takes_the_place_of_what_it_knows_and_agrees_with_the_sample(
    part: str, topics: int, said: str, known: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "NEW_TOPICS", topics)
    organism, this, measured = gated()
    verdicts, evidence = draws.verdicts_without_sampling(organism, this, rows := measured.rows, part)
    names = {rule_name(*key) for key in verdicts}
    assert set(said.split()) <= names and names - set(said.split()) <= {"C4"}
    at = [(organism.name, *one, "main") for one in known]
    replaced, sample = (table.set_index(KEYS) for table in (evidence, rows))
    assert all((replaced.loc[at, end] == replaced.loc[at, "estimate"]).all() for end in ("ci_low", "ci_high"))
    assert replaced.loc[at, "estimate"].to_list() == pytest.approx(sample.loc[at, "estimate"].to_list(), abs=0.2)
    rest = sample.index[~sample.index.get_level_values("claim").isin({"gate", *draws.IN_CLOSED_FORM[part]})]
    pd.testing.assert_frame_equal(replaced.loc[rest, NUMBERS], sample.loc[rest, NUMBERS])


@pytest.mark.parametrize(("part", "claim"), [("neurons", "C5a"), ("context", "C3")])
def test_a_stored_draw_gets_its_shipped_population_verdict_again(part: str, claim: str) -> None:
    """The corrected C3 shows its weakest family, and gets that family's population value."""
    evidence, stored = read_shipped("evidence"), read_shipped("verdicts").query("purpose == 'main'")
    made = draws.measure_population((part, "late", 11), evidence, stored)["population"]
    shipped = read_shipped("population").query("kind == 'late' and seed == 11 and claim == @claim")
    names = ["kind", "claim", "rule", "seed", "population_verdict"]
    by_rule = [table.sort_values("rule", ignore_index=True) for table in (made, shipped)]
    pd.testing.assert_frame_equal(by_rule[0][names], by_rule[1][names], check_dtype=False)
    assert by_rule[0].population.to_list() == pytest.approx(by_rule[1].population.to_list(), rel=1e-3, nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "part", "seed"),
    [
        ("context_unused", "context", FRESH),
        pytest.param("late", "layers", FRESH_LAST, marks=pytest.mark.slow),
        pytest.param("each_token", "timing", FRESH, marks=pytest.mark.slow),
    ],
)
def test_a_draw_measured_anew_gives_what_is_stored(kind: str, part: str, seed: int) -> None:
    stored = read_shipped("verdicts").query("kind == @kind and seed == @seed and purpose == 'main'")
    drawn = draws.measure_draw(PlannedDraw("main", part, kind, seed))["verdicts"]
    stored = stored.set_index(["claim", "rule"]).loc[list(zip(drawn.claim, drawn.rule, strict=True))]
    assert len(drawn) and stored.verdict.to_list() == drawn.verdict.to_list()
    numbers = ["estimate", "ci_low", "ci_high"]
    np.testing.assert_allclose(drawn[numbers], stored[numbers], atol=5e-3)


def test_rules_of_today_say_of_the_stored_evidence_what_is_stored() -> None:
    stored = read_shipped("verdicts").query("purpose == 'main'").set_index(["kind", "seed", "claim", "rule"]).verdict
    asked = {
        (kind, seed, one.claim, one.rule): one.verdict
        for (part, kind, seed), evidence in [*read_shipped("evidence").groupby(["part", "kind", "seed"])][::20]
        for one in draws.judged(evidence, f"compiled-{kind}-{seed}", part)
    }
    known = [key for key in asked if key in stored.index]  # a younger rule has no stored verdict
    assert len(known) > 50 and [asked[key] for key in known] == stored[known].to_list()


# ---- what was built where ----


def test_the_writer_has_the_largest_direct_effect() -> None:
    scores = truths.localise_draw(*gated())
    table = scores.set_index(["estimator", "what"]).value
    assert {"total", "direct", "computed", "window", "gradient screen"} == set(scores.estimator)
    assert table["direct", "layer error"] == 0 and table["direct", "module accuracy"] == 1
    assert table["total", "neurons, auroc"] > 0.95 and truths.mechanism_neurons(gated()[0]).sum() >= 2
    assert table["computed", "decision found"] == 1 and table["computed", "decision, layer error"] == 0


def test_what_is_copied_from_the_end_token_enters_by_the_copying() -> None:
    design = draw_design("skip_only", 0)
    assert truths.writer(design) == ("attn_out", design.write_layer) and design.stages[0].target == "stage0"
    assert truths.decider(design) == ("mlp_out", design.stages[0].layer)
    assert truths.mechanism_components(replace(design, side=None)) == {truths.writer(design)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HELD_OUT])
def test_what_is_written_where_names_the_one_that_decides_and_the_one_that_writes(kind: str) -> None:
    design = draw_design(kind, 11)
    roles = truths.written_parts(design).set_index(["site", "layer"]).role
    assert "decides" in roles[truths.decider(design)]
    assert ("copies" if design.writer == "copy" else "writes") in roles[truths.writer(design)]
    assert roles.str.contains("decides").sum() == 1 and len(roles) == 2 * design.n_layers


def test_a_built_model_comes_with_the_effect_of_each_pair() -> None:
    one = truths.built("skip_only", 11)
    pair, subject = one.study.of("T2")[0], one.study.subject
    wanted = estimands.mediators(subject, ["mlp_out"])
    found = estimands.measure_effects(subject, [pair], one.study.openers, wanted, ("Y1",))
    assert one.te[pair.pair.id] == pytest.approx(found.te[0], abs=compiled.TOLERANCE) and one.claims["C1"] is False
