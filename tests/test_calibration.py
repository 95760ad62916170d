"""The calibration: its plan, its files, and that a draw is the pipeline of the notebooks on a model whose truth is known."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from companion.base.errors import InputError
from companion.base.thresholds import UNTRAINED
from companion.calibration import campaign, localise, one_draw, population, rates
from companion.calibration.campaign import PlannedDraw
from companion.calibration.rates import ENOUGH_NULLS, FRESH_LAST, FRESH_LATER, JUDGED_FROM, UNSEEN
from companion.evidence import neurons, pipeline
from companion.evidence.layers import evidence_c2, measure_layers
from companion.mediation import control_models, estimands, path_specific, sweeps
from companion.mediation.study import Study
from organisms import compiled
from organisms.compiled_program import draw_design

NULLS = {
    "C1": ("early", "middle", "late_like_benign", "skip_only"),
    "C2": ("attention", "skip_only"),
    "C3": ("context_free", "context_unused"),
    "C4": ("attention", "skip_only"),
    "C5a": ("distributed", "attention", "early", "middle", "permuted"),
    "C5b": ("late", "distributed", "adjacent", "permuted", "middle"),
    "C5c": ("each_token",),
    "C6": ("early", "middle"),
}


def test_the_plan_has_enough_nulls_of_every_claim() -> None:
    draws = campaign.plan_draws()
    assert len({draw.name for draw in draws}) == len(draws) == len({campaign.draw_key(draw) for draw in draws})
    counts = Counter((draw.part, draw.kind) for draw in draws if draw.purpose == "main")
    for claim, kinds in NULLS.items():
        assert sum(counts[campaign.PART_OF[claim], kind] for kind in kinds) >= ENOUGH_NULLS, claim
    neurons = [draw for draw in draws if draw.purpose == "main" and draw.part == "neurons"]
    assert sum(not draw_design(draw.kind, draw.seed).contiguous for draw in neurons) >= ENOUGH_NULLS, "C7"
    # A corrected rule that is younger than some draws is judged on the others only.
    fresh = Counter((draw.part, draw.kind, draw.seed) for draw in draws if draw.purpose == "main")
    for claim, first in JUDGED_FROM.items():
        part = campaign.PART_OF[claim]
        assert sum(
            n for (at, kind, seed), n in fresh.items() if at == part and kind in NULLS[claim] and seed >= first
        ) >= (ENOUGH_NULLS), claim


def test_the_kinds_that_are_counted_make_their_claims_false() -> None:
    for claim, kinds in NULLS.items():
        for kind in kinds:
            made = compiled.draw(kind, campaign.FRESH, topics=10, pairs_per_topic=1)
            assert made.claims[claim] is False, (claim, kind)


def test_no_draw_that_was_seen_before_the_corrections_is_counted() -> None:
    """The first look is history: no plan measures it again, so a table that is made anew has none."""
    assert min(draw.seed for draw in campaign.plan_draws()) == campaign.FRESH
    old = campaign.read_draws().query("purpose == 'first look'")
    assert (old.seed < campaign.FRESH).all() and set(old.rule) <= {"registered"}
    assert not set(rates.main_draws().seed) & set(old.seed)


def test_power_models_are_not_those_of_the_error_rates() -> None:
    seeds = {
        is_main: {d.seed for d in campaign.plan_draws() if (d.purpose == "main") == is_main}
        for is_main in (True, False)
    }
    assert not seeds[True] & seeds[False]


def fake(draw: PlannedDraw) -> dict[str, pd.DataFrame]:
    """Tables of the right kind without a model."""
    made = {}
    for name, schema in campaign.SCHEMAS.items():
        row = {column: {"str": "x", "int": 1, "float": 0.5}[kind] for column, kind in schema.items()}
        known = {
            "claim": "C1",
            "kind": draw.kind,
            "part": draw.part,
            "seed": draw.seed,
            "topics": draw.topics,
            "pairs": draw.pairs,
        }
        known |= {"purpose": draw.purpose, "effect": 2.5 if draw.effect is None else draw.effect}
        made[name] = pd.DataFrame([row | {key: value for key, value in known.items() if key in row}])
    return made


DRAWS = [PlannedDraw("main", "layers", "late", seed) for seed in range(3)] + [
    PlannedDraw("effect", "layers", "late", 100, effect=0.5)
]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(draw: PlannedDraw) -> dict[str, pd.DataFrame]:
        asked.append(draw.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fake(draw)

    monkeypatch.setattr(campaign, "measure_draw", measure)
    with pytest.raises(KeyboardInterrupt):
        campaign.run_draws("1/1", tmp_path, DRAWS)
    assert {len(campaign.read_draws(tmp_path, name)) for name in campaign.SCHEMAS} == {2}, "joined"
    campaign.run_draws("1/1", tmp_path, DRAWS)
    assert asked == [*(draw.name for draw in DRAWS[:3]), *(draw.name for draw in DRAWS[2:])]
    before = (tmp_path / "verdicts.parquet").read_bytes()
    for path in (tmp_path / ".parts").iterdir():
        path.unlink()
    campaign.run_draws("1/1", tmp_path, DRAWS)
    assert len(asked) == 5, "a clone has the shipped tables only, and nothing is measured twice"
    assert (tmp_path / "verdicts.parquet").read_bytes() == before


def test_shares_split_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "measure_draw", fake)
    campaign.run_draws("2/2", tmp_path, DRAWS)
    assert list(campaign.read_draws(tmp_path).seed) == [100, 1]
    with pytest.raises(InputError, match="such as 1/2"):
        campaign.run_draws("0/2", tmp_path, DRAWS)


@pytest.fixture(scope="module")
def organism() -> compiled.Organism:
    seed = next(seed for seed in range(20) if draw_design("gated", seed).n_layers == 6)
    return compiled.draw("gated", seed, topics=10, pairs_per_topic=1)


def study_of(organism: compiled.Organism) -> Study:
    """Its study with one benign behaviour only, to be quick."""
    this = compiled.study(organism)
    return replace(this, pairs=tuple(this.of("T1", "T2", "T2b", "B1")))


@pytest.fixture(scope="module")
def measured(organism: compiled.Organism) -> pipeline.Measured:
    return pipeline.measure_study(study_of(organism), organism.name)


KEYS = ["model", "claim", "quantity", "variant"]
NUMBERS = ["estimate", "ci_low", "ci_high"]


def test_the_pipeline_gives_the_rows_of_the_notebooks(organism: compiled.Organism, measured: pipeline.Measured) -> None:
    """On all pairs, as the notebooks have them: pairs of the validate split change no row that is shared."""
    this = study_of(organism)
    layers = measure_layers(this, organism.name)
    modules = estimands.with_difference(sweeps.run_sweep(this, "modules")["effects"], this.twins)
    rows = layers.evidence + evidence_c2(layers.effects, modules, organism.name, control_models.normalisations(this))
    rows += neurons.neuron_evidence(neurons.measure_neurons(this), organism.name)
    mine = measured.rows.set_index(KEYS)
    notebook = pd.DataFrame(rows).set_index(KEYS)
    assert {"gate", "C1", "C2", "C3", "C5a", "C7"} == set(notebook.reset_index().claim)
    # Pairs in other batches differ in the last bit: ties of ranks, and interval ends over three topics, jump by a little.
    np.testing.assert_allclose(mine.loc[notebook.index, NUMBERS], notebook[NUMBERS], atol=0.02)
    exact = [key for key in notebook.index if key[1] in ("gate", "C1", "C2", "C3")]
    np.testing.assert_allclose(mine.loc[exact, "estimate"], notebook.loc[exact, "estimate"], atol=2e-5)


def test_without_prompts_all_claims_but_c6_have_rows_and_the_twin_has_its_own(measured: pipeline.Measured) -> None:
    own = measured.rows[~measured.rows.model.str.endswith(UNTRAINED)]
    assert {"gate", "C1", "C2", "C3", "C4", "C5a", "C5b", "C5c", "C7"} == set(own.claim)
    twin = measured.rows[measured.rows.model.str.endswith(UNTRAINED)]
    assert set(twin.claim) <= {"gate", "C1"} and len(twin)


def test_the_code_of_a_draw_covers_its_rules_and_models() -> None:
    names = {path.name for path in one_draw._imports(Path(one_draw.__file__))}
    assert {"pipeline.py", "ledger.py", "compiled.py"} <= names
    assert one_draw.code() == one_draw.code() != ""


def test_too_few_topics_stop_every_claim_at_the_gate() -> None:
    drawn = one_draw.one_draw("late", 0, topics=5, parts=("layers",))
    verdicts, found = drawn.verdicts, drawn.localisation
    assert set(verdicts.claim) == set(pipeline.STAGES["layers"])
    assert set(verdicts.verdict) == {"inconclusive"} and set(verdicts.gate) == {"stopped"}
    assert verdicts.set_index("claim").truth.to_dict()["C1"] == "true"
    assert {"total", "direct", "computed"} == set(found.estimator)


def test_the_writer_has_the_largest_direct_effect(organism: compiled.Organism, measured: pipeline.Measured) -> None:
    table = localise.localise_draw(organism, study_of(organism), measured).set_index(["estimator", "what"]).value
    assert table["direct", "layer error"] == 0 and table["direct", "module accuracy"] == 1
    assert table["total", "neurons, auroc"] > 0.95
    assert localise.neurons(organism).sum() >= 2
    assert {"total", "direct", "computed", "window", "gradient screen"} == set(table.index.get_level_values(0))
    assert table["computed", "decision found"] == 1 and table["computed", "decision, layer error"] == 0


def test_what_is_copied_from_the_end_token_enters_by_the_copying() -> None:
    made = compiled.draw("skip_only", 0, topics=10, pairs_per_topic=1)
    assert localise.writer(made) == ("attn_out", made.design.write_layer)
    assert localise.decider(made) == ("mlp_out", made.design.stages[0].layer)
    assert {site for site, _ in localise.components(replace(made, design=replace(made.design, side=None)))} == {
        "attn_out"
    }
    assert draw_design("skip_only", 0).stages[0].target == "stage0"


def test_population_values_have_no_width_and_leave_the_rest_alone(measured: pipeline.Measured) -> None:
    label = measured.rows.model.iloc[0]
    made = population.with_values(measured.rows, label, {("C1", "late share", "main"): 0.9})
    changed = (made[NUMBERS] != measured.rows[NUMBERS]).any(axis=1)
    row = made[changed].iloc[0]
    assert changed.sum() == 1 and row.quantity == "late share" and (row[NUMBERS] == 0.9).all()


def test_the_population_agrees_with_a_large_sample(
    organism: compiled.Organism, measured: pipeline.Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "TOPICS", 60)
    found = population.verdicts_without_sampling(organism, study_of(organism), measured.rows, "neurons")
    assert set(found) == {("C5a", "registered"), ("C5a", "corrected")}
    rows = found["C5a", "registered"][1].set_index(KEYS)
    at = (organism.name, "C5a", "psi1", "main")
    sample = measured.rows.set_index(KEYS).loc[at]
    assert rows.loc[at].ci_low == rows.loc[at].ci_high
    assert rows.loc[at].estimate == pytest.approx(sample.estimate, abs=0.2)


def test_the_carriers_in_closed_form_are_those_of_the_model(organism: compiled.Organism) -> None:
    pairs = [one for one in organism.pairs if one.pair.treatment in ("T2", "T2b")]
    keys = ["pair_id", "treatment", "site", "layer"]
    truth = population.carrier_table(organism.program, pairs)
    measured = path_specific.path_effects(study_of(organism)).query("outcome == 'Y1'")
    both = measured.merge(truth, on=keys, suffixes=("", " true"), validate="one_to_one")
    assert len(both) == len(truth) == len(measured)
    for cell in ("y00", "y01", "y10", "y11"):
        assert (both[cell] - both[f"{cell} true"]).abs().max() < compiled.TOLERANCE


def test_c1_to_c4_have_a_population_verdict(
    organism: compiled.Organism, measured: pipeline.Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(population, "TOPICS", 30)
    found = population.verdicts_without_sampling(organism, study_of(organism), measured.rows, "layers")
    assert {("C1", "registered"), ("C2", "registered"), ("C2", "corrected"), ("C4", "corrected")} <= set(found)
    assert ("C1", "corrected") not in found, "the closed form does not know where a decision is computed"
    context = population.verdicts_without_sampling(organism, study_of(organism), measured.rows, "context")
    early = context["C3", "registered"][1]
    psi = early[(early.quantity == "psi0 early, shared tokens") & (early.variant == "main")].iloc[0]
    assert psi.ci_low == psi.ci_high == pytest.approx(psi.estimate)
    rows = found["C1", "registered"][1].set_index(KEYS)
    replaced = rows.loc[
        [(organism.name, "C1", "late share", "main"), (organism.name, "C2", "MLP share of NIE", "main")]
    ]
    assert (replaced.ci_low == replaced.ci_high).all()


def test_population_verdicts_stand_beside_the_verdicts_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("verdicts", "evidence"):
        table = campaign.read_draws(table=name)
        chosen = table[(table.kind == "late") & table.seed.isin([11, 12])]
        campaign.store.write_table(chosen[chosen.claim.isin(["gate", "C5a"])], tmp_path / f"{name}.parquet")
    monkeypatch.setattr(population, "TOPICS", 40)
    asked: list[population.Draw] = []
    original = population.measure_population

    def measure(draw: population.Draw, evidence: pd.DataFrame, stored: pd.DataFrame) -> pd.DataFrame:
        asked.append(draw)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(draw, evidence, stored)

    monkeypatch.setattr(population, "measure_population", measure)
    monkeypatch.setattr(population, "wanted", lambda evidence: [("neurons", "late", 11), ("neurons", "late", 12)])
    with pytest.raises(KeyboardInterrupt):
        population.run_population("1/1", tmp_path)
    population.run_population("1/1", tmp_path)
    population.run_population("1/1", tmp_path)
    assert asked == [("neurons", "late", 11)] + [("neurons", "late", 12)] * 2
    joined = rates.main_draws(tmp_path).set_index(["claim", "seed"])
    assert set(joined.population_verdict) == {"supported"} and joined.population.notna().all()
    assert {("C5a", 11), ("C5a*", 12)} <= set(joined.index)


def test_estimators_are_compared_on_the_same_models() -> None:
    row = {"kind": "late", "what": "components, auroc", "value": 1.0}
    table = pd.DataFrame(
        [{**row, "estimator": "total", "seed": seed} for seed in range(4)]
        + [{**row, "estimator": "direct", "seed": seed, "value": 0.5} for seed in range(2)]
        + [{**row, "estimator": "total", "seed": seed, "what": "decision found", "value": 0.0} for seed in (8, 9)]
    )
    found = localise.compared(table).set_index(["what", "estimator"])
    assert found.models.to_dict() == {
        ("components", "total"): 2,
        ("components", "direct"): 2,
        ("the deciding component", "total"): 2,
    }
    assert found.loc[("components", "direct"), "estimate"] == 0.5


def test_the_youngest_corrections_are_not_judged_on_draws_that_were_seen(tmp_path: Path) -> None:
    table = campaign.read_draws().query("purpose == 'main'")
    youngest = "claim in ['C1*', 'C4*', 'C6*']"
    starred = rates.main_draws().query(youngest)
    planned = Counter(
        (draw.part, draw.seed >= FRESH_LAST) for draw in campaign.plan_draws() if draw.seed >= FRESH_LATER
    )
    n_last = planned["layers", True]
    assert starred.groupby("claim").size().to_dict() == {
        "C1*": planned["layers", False] + len(UNSEEN) + n_last,
        "C4*": n_last,
        "C6*": planned["steering", False] + planned["steering", True],
    }
    old = table[(table.rule == "registered") & table.claim.isin(["C1", "C4", "C6"])]
    anew = pd.concat([table, old.assign(rule="corrected")]).drop_duplicates(
        ["kind", "seed", "claim", "rule", "purpose"]
    )
    campaign.store.write_table(anew, tmp_path / "verdicts.parquet")
    again = rates.main_draws(tmp_path).query(youngest)
    names = ["claim", "kind", "seed"]
    assert len(anew) > len(table) and again[names].value_counts().to_dict() == starred[names].value_counts().to_dict()
