"""Scores of estimators against the mechanism that was built."""

from dataclasses import replace

import pandas as pd
import pytest
from measured_organism import few_pairs, gated_organism, measured_organism

from companion.calibration import localise
from organisms import compiled
from organisms.compiled_program import draw_design


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


def test_estimators_are_compared_on_the_same_models() -> None:
    made = [("components, auroc", "total", seed, 1.0) for seed in range(4)]
    made += [("components, auroc", "direct", seed, 0.5) for seed in range(2)]
    made += [("decision found", "total", seed, 0.0) for seed in (8, 9)]
    table = pd.DataFrame(made, columns=["what", "estimator", "seed", "value"]).assign(kind="late")
    found = localise.compare_estimators(table).set_index(["what", "estimator"])
    assert found.models.to_dict() == {
        ("components", "total"): 2, ("components", "direct"): 2, ("the deciding component", "total"): 2,
    }  # fmt: skip
    assert found.loc[("components", "direct"), "estimate"] == pytest.approx(0.5)
