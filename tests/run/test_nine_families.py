"""A folder as a user would hand it in, of one family, through the sweeps in one process, or through all notebooks."""

import json
from pathlib import Path

import pandas as pd
import pytest
from models import FAMILIES
from nine_families import TREATMENTS, main, model_folder, prompt_folder, texts_in, through

from companion.base import folders
from companion.evidence import layers
from companion.mediation import study


@pytest.mark.parametrize("family", [FAMILIES[3], *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES)])
def test_a_folder_of_a_family_is_measured(tmp_path: Path, family: str) -> None:
    prompts, model = prompt_folder(tmp_path / "prompts"), model_folder(family, tmp_path / "model")
    folders.check_model(str(model))
    this = study.begin(str(model), str(prompts), "tiny", profile="smoke")
    assert this.treatments == TREATMENTS and len(this.pairs) == 24 * len(TREATMENTS)
    found = layers.measure_layers(this, "tiny", full_response=True)
    assert {"T1", "T2-T2b", "B5"} <= set(found.effects.treatment) and {"Y1", "Y2"} <= set(found.effects.outcome)
    top = found.effects.query("site == 'resid_post' and position == 'last' and outcome == 'Y1'")
    top = top[top.layer == top.layer.max()]
    assert (top.nie0 - top.te).abs().max() < 1e-4 * top.te.abs().max()  # the last residual stream carries everything
    assert {row["claim"] for row in found.evidence} >= {"gate", "C3"}


def test_a_family_goes_through_all_notebooks_with_a_judge_and_shows_no_prompt() -> None:
    assert main(["--families", "llama", "--judged"]) == 0


@pytest.mark.slow
def test_notebook_06_goes_on_where_the_model_refused_nothing(tmp_path: Path) -> None:
    """Random weights refuse no prompt: C6 is not defined, and the prompting baseline is tried on the test prompts."""
    prompts, model = prompt_folder(tmp_path / "prompts"), model_folder("gpt2", tmp_path / "gpt2")
    flags = ["--model", str(model), "--prompts", str(prompts), "--profile", "smoke", "--name", "tiny", "--only", "06"]
    assert not through("gpt2", flags, tmp_path)
    tables = {name: pd.read_csv(tmp_path / "results" / "tiny" / f"06_{name}.csv") for name in ("summary", "evidence")}
    rows = tables["summary"].set_index("method")
    assert rows.harm_rate_low["prompting"] <= rows.harm_rate["prompting"] <= rows.harm_rate_high["prompting"]
    assert 0 < rows.p_holm["prompting"] <= 1 and "AdaSteer-style, late layers" not in rows.index
    note = tables["evidence"].set_index("quantity").note["not defined"]
    assert note.startswith("the model refused no harmful prompt: add plainer ones")
    assert len(tables["evidence"]) == 1


def test_a_text_that_is_left_behind_is_found(tmp_path: Path) -> None:
    prompt_folder(tmp_path / "prompts")
    text = json.loads((tmp_path / "prompts" / "pairs.jsonl").read_text().splitlines()[0])["treated"]
    one, two = text.split()[1:3]
    assert texts_in(tmp_path, "w10 w11") == (0, [])
    assert texts_in(tmp_path, f"a warning about {text}") == (0, ["the terminal"])
    place = tmp_path / "results" / "x"
    place.mkdir(parents=True)
    pd.DataFrame({"token": ["w3", one, two], "nie": [0.1, 0.2, 0.3]}).to_parquet(place / "by_row.parquet")
    (place / "02.ipynb").write_text(json.dumps({"outputs": [f"<td>{one}</td>\n<td>{two}</td>"]}))
    (place / "run.log").write_text(f"x {one} {two} y")
    (place / "fine.csv").write_text("w3,w4,w5\nhidden: T1-0")
    assert texts_in(tmp_path, "") == (4, ["results/x/02.ipynb", "results/x/by_row.parquet", "results/x/run.log"])
