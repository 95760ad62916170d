"""The runner on toy notebooks: what is fresh is skipped, independent ones run side by side, failures change nothing."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from toys import CLAIMS, EMBEDDED, Toy, environment

from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.run import checks, notebooks, runner
from companion.run.runner import NEEDS

EVERYTHING = ("00", "01", "02", "03", "08")


def stale(toy: Toy) -> set[str]:
    return {line[:2] for line in toy.run("--list").stdout.splitlines() if " stale " in line}


def test_a_run_leaves_everything_that_is_promised(toy_done: Toy) -> None:
    lines = (toy_done.root / "first_run.txt").read_text().splitlines()
    ended = [line.split()[1] for line in lines if line.endswith(" s")]
    assert ended[0] == "01_toy" and set(ended[1:3]) == {"02_toy", "03_toy"} and ended[3:] == ["08_toy", "00_toy"]
    assert lines[-3:] == ["claim  verdict", "C1     supported", "C2     not testable"]
    made = toy_done.contents()
    assert {"results/claims.csv", "results/embedded/claims.csv", "results/embedded/manifest.json"} <= set(made)
    for number in ("00", "01", "02", "03"):
        assert {f"results/embedded/{number}_toy.csv", f"figures/embedded/{number}_toy.svg"} <= set(made)
    times = json.loads((toy_done.root / "results/embedded/run_times.json").read_text())
    assert set(times) == {f"{n}_toy" for n in EVERYTHING} and not list(toy_done.root.rglob("stage*"))
    manifest = json.loads(made["results/embedded/manifest.json"])
    assert manifest["model"]["name"] == "window-0" and len(manifest["model"]["sha256"]["model.safetensors"]) == 64
    assert set(manifest["prompts"]["sha256"]) >= {"pairs.jsonl", "outcome.json"}
    found = [manifest[name] for name in ("device", "dtype", "profile", "seed", "git", "chunk_sizes")]
    assert found == ["cpu", "float32", "full", 0, None, None]
    assert manifest["packages"]["torch"].replace(".", "").isdigit()


def test_the_committed_notebook_is_executed_and_clean(toy_done: Toy) -> None:
    for number in EVERYTHING:
        notebook = json.loads(toy_done.notebook(number).read_text())
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i:02d}" for i in range(len(notebook["cells"]))]
        assert not {"papermill", "widgets"} & set(notebook["metadata"])
        assert {key for cell in notebook["cells"] for key in cell["metadata"]} == {"tags"}
        assert notebook["metadata"]["language_info"].get("version") is None
    printed = json.loads(toy_done.notebook("01").read_text())["cells"][3]["outputs"]
    assert printed == [{"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}]


def test_a_check_that_fails_is_shown_and_ends_no_run(toy: Toy) -> None:
    toy.write("02", "from companion.base.display import check", 'check(False, "two routes differ")\nprint("on")')
    done = toy.run("--only", "02")
    assert done.returncode == 0 and "1 of its checks FAILED, see its outputs" in done.stdout
    (text,) = json.loads(toy.notebook("02").read_text())["cells"][-1]["outputs"]
    assert text["text"][0].startswith("CHECK FAILED: two routes differ.") and text["text"][1] == "on\n"
    strict = toy.run("--only", "02", "--force", COMPANION_STRICT="1")  # as the tests run the notebooks
    assert strict.returncode == 1 and "AssertionError: two routes differ" in strict.stderr


@pytest.mark.parametrize(
    ("why", "kind", "slug"), [(None, "nbval", runner.DEFAULTS["SLUG"]), (InputError("no"), "run", "embedded")]
)
def test_the_projects_own_tests_check_every_notebook_strictly(monkeypatch, why, kind, slug):
    """Those of the default run, or of `embedded` where its model is out of reach."""
    step = Mock(side_effect=lambda name, *_: (name, name != "mypy", 0.0))
    compare = Mock(return_value=("committed results", True, 0.0))
    monkeypatch.setattr(checks.smollm2, "fetch_smollm2", Mock(side_effect=why))
    monkeypatch.setattr(checks, "_step", step)
    monkeypatch.setattr(checks, "compare", compare)
    assert checks.run_all() == 1 and compare.call_args.args[1] == slug
    books = [call.args[2] for call in step.call_args_list if call.args[0].startswith(f"{kind} ")]
    assert len(books) == len(NEEDS) and all(variables["COMPANION_STRICT"] == "1" for variables in books)


def test_a_kernel_and_a_profile_of_the_users_own_are_left_alone(toy: Toy, tmp_path: Path) -> None:
    kernel, startup = tmp_path / "jupyter/kernels/python3", tmp_path / "ipython/profile_default/startup"
    kernel.mkdir(parents=True)
    startup.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "broken", "language": "python"}')
    (startup / "00.py").write_text("raise SystemExit('the profile ran')")
    places = {"JUPYTER_PATH": str(tmp_path / "jupyter"), "JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}
    done = toy.run("--only", "01", **places, IPYTHONDIR=str(tmp_path / "ipython"))
    assert done.returncode == 0, done.stderr


def test_a_folder_of_another_user_is_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(runner.freshness, "note", forbidden)
    assert runner.make_plan(EMBEDDED).paths  # what --list asks for
    monkeypatch.setattr(Path, "touch", forbidden)
    with pytest.raises(InputError, match=r"name folders of your own in COMPANION_RESULTS"), runner.only_run(tmp_path):
        pass


MEETS = """import time
files.write_text("", paths.Path({folder!r}) / "{own}")
end = time.monotonic() + {seconds}
while not (paths.Path({folder!r}) / "{other}").exists() and time.monotonic() < end:
    time.sleep(0.05)
assert (paths.Path({folder!r}) / "{other}").exists(), "alone" """


@pytest.mark.parametrize("jobs", ["2", "1"])
def test_notebooks_that_do_not_need_each_other_run_side_by_side(toy: Toy, jobs: str) -> None:
    for own, other in (("02", "03"), ("03", "02")):
        toy.write(own, MEETS.format(folder=str(toy.root), own=own, other=other, seconds=60 if jobs == "2" else 1))
    done = toy.run("--only", "02,03", "--jobs", jobs)
    if jobs == "1":  # the first met nobody, the second found its mark
        assert done.returncode == 1 and done.stderr.count("alone") == 1
    else:
        started = sorted(line.split()[:2] for line in done.stdout.splitlines()[1:3])  # either may print first
        assert done.returncode == 0 and started == [["[2/3]", "02_toy"], ["[3/3]", "03_toy"]], done.stderr


def test_two_jobs_are_the_default_for_a_small_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs(n_cores: int, **changes: str) -> int:
        monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _: range(n_cores), raising=False)
        return runner.default_jobs(runner.Plan({**runner.DEFAULTS, **changes}, {}, {}, {}, {}, frozenset()))

    assert (jobs(2), jobs(1), jobs(8, MODEL="/my/model"), jobs(8, DEVICE="cuda")) == (2, 1, 1, 1)
    assert jobs(2, MODEL="smollm2") == 2
    monkeypatch.setattr(runner.os, "sysconf", lambda name: 8_000_000_000 if name == "SC_PHYS_PAGES" else 1)
    assert jobs(8) == 1, "two would not fit into the memory"


def test_nothing_to_do_takes_under_two_seconds_and_no_package(toy_done: Toy, tmp_path: Path) -> None:
    place = tmp_path / "venv"  # an environment whose stamp says that it is filled, and which is empty
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    stamp = hashlib.sha256((toy_done.root / "requirements.lock").read_bytes()).hexdigest()
    (place / "companion-lock.sha256").write_text(stamp)
    seconds = []
    for _ in range(3):  # the fastest of three: other work on the machine is not ours
        start = time.monotonic()
        done = toy_done.shell(VIRTUAL_ENV=str(place))
        seconds.append(time.monotonic() - start)
        assert done.stdout.count("fresh, skipped") == 5 and "C1     supported" in done.stdout, done.stderr
    assert min(seconds) < 2
    lines = toy_done.shell("--list", VIRTUAL_ENV=str(place)).stdout.splitlines()
    assert [line[:6] for line in lines] == [f"{number}_toy" for number in EVERYTHING]
    assert all(line.split()[2:] == ["s", "fresh", "Toy", line[:2]] for line in lines)


def test_everything_that_results_rest_on_makes_them_stale(toy: Toy) -> None:
    notebook = json.loads(toy.notebook("01").read_text())
    notebook["cells"][0]["source"] = ["# Another title"]
    toy.notebook("01").write_text(json.dumps(notebook))
    assert stale(toy) == set()  # words change nothing
    toy.write("03", "1 + 1")  # a changed cell, and what needs it
    assert stale(toy) == {"03", "08", "00"}
    for name in ("companion/base/paths.py", "requirements.lock", "data/prompts/embedded/outcome.json"):
        path = toy.root / name
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        assert stale(toy) == set(EVERYTHING)
        path.write_bytes(before)


def test_a_failing_cell_leaves_everything_as_it_was_and_stops_no_sibling(toy: Toy) -> None:
    toy.write("02", 'files.write_text("value\\nwrong\\n", out / "02_toy.csv")', "1 / 0")
    toy.write("03", '_ = files.write_text("value\\nnew\\n", out / "03_toy.csv")')
    before = toy.contents()
    done = toy.run()
    assert done.returncode == 1
    assert "02_toy: code cell 4: ZeroDivisionError: division by zero\n" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "ZeroDivisionError" in (toy.root / "results/embedded/logs/02_toy.log").read_text()
    assert "[4/5] 08_toy not started: what it needs failed (02_toy)" in done.stdout
    assert "[5/5] 00_toy not started: what it needs failed (02_toy)" in done.stdout
    after = toy.contents()
    changed = {name for name, data in after.items() if data != before.get(name)}
    assert changed == {"notebooks/03_toy.ipynb", "results/embedded/03_toy.csv"}
    assert set(before) - set(after) == {"figures/embedded/03_toy.svg"}  # which 03 no longer writes
    assert stale(toy) == {"02", "08", "00"}


MORE = """if PROFILE == "full":
    files.write_text("svg", figures / "02_more.svg")
    files.write_text("value\\n1\\n", out / "more" / "02.csv")
_ = files.write_text("value\\n1\\n", out / "02_toy.csv")"""


def test_what_a_notebook_no_longer_writes_goes_when_it_has_finished(toy: Toy) -> None:
    toy.write("02", MORE)
    assert toy.run("--only", "02,03").returncode == 0
    for name in ("results/embedded/02_mine.csv", "figures/embedded/02_mine.svg", "results/embedded/parts/k/0.parquet"):
        (toy.root / name).parent.mkdir(parents=True, exist_ok=True)
        (toy.root / name).write_text("mine")
    before, more = set(toy.contents()), {"figures/embedded/02_more.svg", "results/embedded/more/02.csv"}
    assert more <= before
    toy.write("02", MORE.replace('"full"', '"smoke"'), "1 / 0")
    assert toy.run("--only", "02").returncode == 1 and set(toy.contents()) == before
    toy.write("02", MORE.replace('"full"', '"smoke"'))
    assert toy.run("--only", "02").returncode == 0 and set(toy.contents()) == before - more


def test_another_run_has_its_own_folders_and_its_verdicts_join_the_others(toy: Toy) -> None:
    toy.write("01", 'print(SLUG, PAIRS)\n_ = files.write_text("x", out / "01_toy.csv")')
    toy.write("08", CLAIMS.replace('"embedded,C1,supported"', 'f"{SLUG},C1,supported"'))
    before = toy.contents()
    assert toy.run("--pairs", "20", "--name", "mine", "--only", "08").returncode == 0
    after = toy.contents()
    assert {name for name in before if after[name] != before[name]} == {"results/claims.csv"}
    rows = after["results/claims.csv"].decode().splitlines()[1:]
    assert rows == ["embedded,C1,supported", "embedded,C2,not testable", "mine,C1,supported", "other,C9,none"]
    executed = json.loads(after["results/mine/notebooks/01_toy.ipynb"])
    assert executed["cells"][2]["id"] == "injected-parameters"
    assert "".join(executed["cells"][4]["outputs"][0]["text"]) == "mine 20\n"
    assert json.loads(after["results/mine/manifest.json"])["pairs"] == 20


@pytest.mark.parametrize("printed,status", [("a", 0), ("changed", 1)])
def test_nbval_compares_what_is_printed(toy: Toy, printed: str, status: int) -> None:
    text = toy.notebook("01").read_text()
    toy.notebook("01").write_text(text.replace('"a\\n"', f'"{printed}\\n"', 1))
    flags = [flag.replace("tests/", f"{ROOT}/tests/") for flag in checks.NBVAL]
    command = [sys.executable, "-m", "pytest", *flags, "notebooks/01_toy.ipynb"]
    done = subprocess.run(command, cwd=toy.root, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout


@pytest.mark.parametrize("text", ["[]", '{"metadata": {}, "cells": [{"cell_type": "code", "source": "1"}]}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "01_toy.ipynb").write_text(text)
    with pytest.raises(InputError, match=r"01_toy\.ipynb is not a notebook as Jupyter writes it"):
        notebooks.read_notebook(tmp_path / "01_toy.ipynb")
