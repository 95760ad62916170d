"""A folder as a user would hand it in, of one family, through the sweeps in one process."""

from pathlib import Path

import pytest
from families import FAMILIES

from helpers import preflight, study
from tests.nine_families import TREATMENTS, model_folder, prompt_folder


@pytest.mark.parametrize("family", [FAMILIES[3], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES)])
def test_a_folder_of_a_family_is_measured(tmp_path: Path, family: str) -> None:
    prompts, model = prompt_folder(tmp_path / "prompts"), model_folder(family, tmp_path / "model")
    preflight.check_model(str(model))
    this = study.begin(str(model), str(prompts), "tiny", profile="smoke")
    assert this.treatments == TREATMENTS and len(this.pairs) == 24 * len(TREATMENTS)
    found = study.measure_layers(this, "tiny", full_response=True)
    assert {"T1", "T2-T2b", "B5"} <= set(found.effects.treatment) and {"Y1", "Y2"} <= set(found.effects.outcome)
    top = found.effects.query("site == 'resid_post' and position == 'last' and outcome == 'Y1'")
    top = top[top.layer == top.layer.max()]
    assert (top.nie0 - top.te).abs().max() < 1e-4 * top.te.abs().max()  # the last residual stream carries everything
    assert {row["claim"] for row in found.evidence} >= {"gate", "C3"}
