"""Random-weight folders of the nine families, each sent through all notebooks by the command that users type.

    OMP_NUM_THREADS=1 python -m tests.test_nine_families                   # all of them; docs/families.md says what came out
    OMP_NUM_THREADS=1 python -m tests.test_nine_families --families gpt2 --only 03

Random weights mean nothing: what is shown is that each notebook runs on each architecture, with prompts of its own. The
prompt set is marked sensitive, and everything that a run leaves behind is searched for its texts.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import pytest

from companion.base import folders
from companion.base.files import write_json, write_text
from companion.base.paths import ROOT
from companion.evidence import layers
from companion.mediation import study
from tests.models import FAMILIES, VOCAB, tiny_model, tiny_qwen_tokenizer, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<s> w3 {{ m.content }} w4 {% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
TREATMENTS = ("T1", "T2", "T2b", "B1", "B2", "B3", "B4", "B5")


def model_folder(family: str, folder: Path) -> Path:
    """A model folder as a user would hand it in: config, safetensors, tokenizer, chat template."""
    tiny_model(family).save_pretrained(folder)
    (tiny_qwen_tokenizer if family == "qwen2" else tiny_tokenizer)(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def judge_folder(folder: Path) -> Path:
    """A model that can be a judge, as its tokenizer has the words Yes and No; its weights are random, so its labels are."""
    tiny_model("gpt2", n_positions=512).save_pretrained(folder)
    tiny_tokenizer(folder, {10: "Yes", 11: "No"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def prompt_folder(folder: Path, topics: int = 24) -> Path:
    """All treatments over the tiny vocabulary; a pair differs in one word, a T2 pair names its twin."""
    rows = []
    for (place, treatment), topic in product(enumerate(TREATMENTS), range(topics)):
        words = [f"w{14 + (7 * topic + 3 * place + step) % (VOCAB - 20)}" for step in range(4)]
        control, treated = (" ".join([words[0], f"w{6 + side}", *words[1:]]) for side in (0, 1))
        row = {"id": f"{treatment}-{topic}", "treatment": treatment, "topic": f"t{topic}"}
        twin = {"twin": f"T2b-{topic}"} if treatment == "T2" else {}
        rows.append(row | {"control": control, "treated": treated} | twin)
    write_text("".join(json.dumps(row) + "\n" for row in rows), folder / "pairs.jsonl")
    write_json({"comply": ["w10", "w11"], "refuse": ["w12", "w13"]}, folder / "outcome.json")
    write_json({"sensitive": True}, folder / "set.json")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.nine_families", description="Nine families through all notebooks.")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--only", help="the last notebook to run (default: all)")
    parser.add_argument("--judged", action="store_true", help="a judge model, of random weights too, labels answers")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        prompts = prompt_folder(Path(folder) / "prompts")
        for family in options.families.split(","):
            model = model_folder(family, Path(folder) / family)
            flags = ["--model", str(model), "--prompts", str(prompts), "--profile", "smoke", "--name", f"tiny-{family}"]
            flags += ["--only", options.only] if options.only else []
            flags += ["--judge", str(judge_folder(Path(folder) / "judge"))] if options.judged else []
            is_wrong = through(family, flags, Path(folder))
            failed += is_wrong
            if options.judged and not is_wrong:  # the run must say that the judge labelled its answers
                manifest = json.loads((Path(folder) / "results" / f"tiny-{family}" / "manifest.json").read_text())
                failed += "judge" not in manifest.get("judge", "")
    return int(failed > 0)


def through(family: str, flags: Sequence[str], folder: Path) -> bool:
    """Runs the command with its results below `folder`, prints one line, and says whether something was wrong."""
    places = {"COMPANION_RESULTS": str(folder / "results"), "COMPANION_FIGURES": str(folder / "figures")}
    start = time.monotonic()
    command = [sys.executable, "-m", "companion.run.cli", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | places, capture_output=True, text=True, check=False)
    ended = [line for line in done.stdout.splitlines() if line.startswith("[") and not line.endswith("...")]
    made = [line.split("] ")[1].split("_")[0] for line in ended]
    verdict = f"notebooks {' '.join(made)}" if done.returncode == 0 else f"FAILED: {done.stderr.strip()}"
    n_files, leaks = texts_in(folder, done.stdout + done.stderr)
    shown = f"PROMPT TEXTS in {', '.join(leaks)}" if leaks else f"no prompt text in {n_files} files"
    print(f"{family:<8} {time.monotonic() - start:4.0f} s  {verdict}  {shown}", flush=True)
    return done.returncode != 0 or bool(leaks)


def texts_in(folder: Path, said: str) -> tuple[int, list[str]]:
    """How many files below `results` and `figures` were searched, and those (or "the terminal") with two words of a prompt.

    Pictures are left out: they are drawn from the tables that are searched.
    """
    lines = (folder / "prompts" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)[side].split() for line in lines for side in ("control", "treated")]
    pieces = {f"{one} {two}" for words in texts for one, two in pairwise(words)}
    places = [path for kind in ("results", "figures") for path in sorted((folder / kind).rglob("*")) if path.is_file()]
    kept = [path for path in places if path.suffix != ".png"]
    found = [path.relative_to(folder).as_posix() for path in kept if _holds(_readable(path), pieces)]
    return len(kept), found + (["the terminal"] if _holds(said, pieces) else [])


def _holds(text: str, pieces: set[str]) -> bool:
    """Whether two words of a prompt follow each other, whatever stands between them: also as rows of a table."""
    words = re.findall(r"\bw\d+\b", text)
    return bool(pieces & {f"{one} {two}" for one, two in pairwise(words)})


def _readable(path: Path) -> str:
    if path.suffix != ".parquet":
        return path.read_text(encoding="utf-8", errors="replace")
    table = pd.read_parquet(path)
    return table.select_dtypes(exclude="number").drop_duplicates().to_csv() + str(list(table.columns))


# ---- tests ----


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


if __name__ == "__main__":
    sys.exit(main())
