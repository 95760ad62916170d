"""Scores of estimators against the mechanism that was built."""

from dataclasses import replace

import pytest
from measured_organism import few_pairs, gated_organism, measured_organism

from companion.calibration import localise
from companion.mediation import estimands
from organisms import compiled
from organisms.compiled_design import HELD_OUT, KINDS, draw_design


def test_the_writer_has_the_largest_direct_effect() -> None:
    organism = gated_organism()
    scores = localise.localise_draw(organism, few_pairs(organism), measured_organism())
    table = scores.set_index(["estimator", "what"]).value
    assert {"total", "direct", "computed", "window", "gradient screen"} == set(scores.estimator)
    assert table["direct", "layer error"] == 0 and table["direct", "module accuracy"] == 1
    assert table["total", "neurons, auroc"] > 0.95 and localise.mechanism_neurons(organism).sum() >= 2
    assert table["computed", "decision found"] == 1 and table["computed", "decision, layer error"] == 0


def test_what_is_copied_from_the_end_token_enters_by_the_copying() -> None:
    made = compiled.draw("skip_only", 0, topics=10, pairs_per_topic=1)
    assert localise.writer(made.design) == ("attn_out", made.design.write_layer)
    assert localise.decider(made.design) == ("mlp_out", made.design.stages[0].layer)
    without_side = replace(made, design=replace(made.design, side=None))
    assert localise.mechanism_components(without_side.design) == {localise.writer(made.design)}
    assert draw_design("skip_only", 0).stages[0].target == "stage0"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HELD_OUT])
def test_what_is_written_where_names_the_one_that_decides_and_the_one_that_writes(kind: str) -> None:
    design = draw_design(kind, 11)
    roles = localise.written_parts(design).set_index(["site", "layer"]).role
    assert "decides" in roles[localise.decider(design)]
    assert ("copies" if design.writer == "copy" else "writes") in roles[localise.writer(design)]
    assert roles.str.contains("decides").sum() == 1 and len(roles) == 2 * design.n_layers


def test_a_built_model_comes_with_the_effect_of_each_pair() -> None:
    one = localise.built("skip_only", 11)
    pair = one.study.of("T2")[0]
    found = estimands.measure_effects(
        one.study.subject, [pair], one.study.openers, estimands.mediators(one.study.subject, ["mlp_out"]), ("Y1",)
    )
    assert one.te[pair.pair.id] == pytest.approx(found.te[0], abs=compiled.TOLERANCE) and one.claims["C1"] is False
