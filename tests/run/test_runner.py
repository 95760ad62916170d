"""The runner on toy notebooks: what is fresh is skipped, what fails leaves everything as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toys import CLAIMS, Toy, environment

from companion.base.paths import ROOT
from companion.run import checks

EVERYTHING = {"00", "01", "02", "03", "08"}
OVERWRITE = 'store.write_text("value\\nwrong\\n", out / "02_toy.csv")'


def names(toy: Toy) -> set[str]:
    return set(toy.contents())


def test_a_run_leaves_everything_that_is_promised(toy_done: Toy) -> None:
    lines = (toy_done.root / "first_run.txt").read_text().splitlines()
    assert [line.split(" ...")[0] for line in lines[:5]] == [
        f"[{place}/5] {number}_toy" for place, number in enumerate(("01", "02", "03", "08", "00"), start=1)
    ]
    assert all(line.endswith(" s") for line in lines[:5])
    assert lines[-3:] == ["claim  verdict", "C1     supported", "C2     not testable"]
    made = names(toy_done)
    assert {"results/claims.csv", "results/embedded/manifest.json", "results/embedded/run_times.json"} <= made
    assert {f"results/embedded/{n}_toy.csv" for n in ("00", "01", "02", "03")} <= made
    assert {f"figures/embedded/{n}_toy.svg" for n in ("00", "01", "02", "03")} <= made
    assert not list(toy_done.root.rglob("stage"))


def test_the_committed_notebook_is_executed_and_clean(toy_done: Toy) -> None:
    for number in ("00", "01", "02", "03", "08"):
        notebook = json.loads(toy_done.notebook(number).read_text())
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i:02d}" for i in range(len(notebook["cells"]))]
        assert not {"papermill", "widgets"} & set(notebook["metadata"])
        assert {key for cell in notebook["cells"] for key in cell["metadata"]} == {"tags"}
        assert notebook["metadata"]["language_info"].get("version") is None
    printed = json.loads(toy_done.notebook("01").read_text())["cells"][3]["outputs"]
    assert printed == [{"name": "stdout", "output_type": "stream", "text": ["a\n", "b\n"]}]


def test_the_manifest_says_what_the_results_were_made_from(toy_done: Toy) -> None:
    results = toy_done.root / "results" / "embedded"
    manifest = json.loads((results / "manifest.json").read_text())
    assert manifest["model"]["name"] == "window-0"
    assert len(manifest["model"]["sha256"]["model.safetensors"]) == 64
    assert set(manifest["prompts"]["sha256"]) >= {"pairs.jsonl", "outcome.json"}
    assert (manifest["device"], manifest["dtype"], manifest["profile"], manifest["seed"]) == (
        "cpu",
        "float32",
        "full",
        0,
    )
    assert manifest["packages"]["torch"].replace(".", "").isdigit()
    assert manifest["git"] is None and manifest["chunk_sizes"] is None
    assert set(json.loads((results / "run_times.json").read_text())) == {
        f"{n}_toy" for n in ("00", "01", "02", "03", "08")
    }


def test_nothing_to_do_takes_under_two_seconds(toy_done: Toy, tmp_path: Path) -> None:
    place = fake_environment(toy_done, tmp_path / "venv")
    seconds = []
    for _ in range(3):  # the fastest of three: other work on the machine is not ours
        start = time.monotonic()
        done = toy_done.shell(VIRTUAL_ENV=str(place))
        seconds.append(time.monotonic() - start)
        assert done.stdout.count("fresh, skipped") == 5 and "C1     supported" in done.stdout, done.stderr
    assert min(seconds) < 2


def fake_environment(toy: Toy, place: Path) -> Path:
    """An active environment whose stamp says that it is filled; its Python can only do what needs no package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    code = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest(), end='')"
    command = [sys.executable, "-c", code, str(toy.root / "requirements.lock")]
    stamp = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (place / "companion-lock.sha256").write_text(stamp)
    return place


def stale(toy: Toy, *flags: str) -> set[str]:
    lines = toy.run("--list", *flags).stdout.splitlines()
    return {line[:2] for line in lines if " stale " in line}


def test_the_list_shows_times_titles_and_what_is_fresh(toy_done: Toy) -> None:
    lines = toy_done.run("--list").stdout.splitlines()
    assert [line[:6] for line in lines] == ["00_toy", "01_toy", "02_toy", "03_toy", "08_toy"]
    assert all(line.split()[2:] == ["s", "fresh", "Toy", line[:2]] for line in lines)


def test_everything_that_results_rest_on_makes_them_stale(toy: Toy) -> None:
    assert stale(toy) == set()
    toy.write("03", "1 + 1")  # a changed cell, and what needs it
    assert stale(toy) == {"03", "08", "00"}
    toy.write("02", CLAIMS)
    assert stale(toy) == {"02", "03", "08", "00"}


@pytest.mark.parametrize("name", ["companion/base/paths.py", "requirements.lock", "data/prompts/embedded/outcome.json"])
def test_shared_inputs_make_everything_stale(toy: Toy, name: str) -> None:
    path = toy.root / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert stale(toy) == EVERYTHING


def test_words_and_titles_make_nothing_stale(toy: Toy) -> None:
    notebook = json.loads(toy.notebook("01").read_text())
    notebook["cells"][0]["source"] = ["# Another title"]
    toy.notebook("01").write_text(json.dumps(notebook))
    assert stale(toy) == set()


def test_a_lost_result_is_made_again(toy: Toy) -> None:
    (toy.root / "figures" / "embedded" / "02_toy.svg").unlink()
    assert stale(toy) == {"02"}
    done = toy.run("--only", "2")
    assert (done.returncode, "figures/embedded/02_toy.svg" in names(toy)) == (0, True)
    assert "[1/2] 01_toy fresh, skipped\n[2/2] 02_toy (last time" in done.stdout


def test_a_forced_rerun_gives_the_same_bytes(toy: Toy) -> None:
    before = {name: data for name, data in toy.contents().items() if "/logs/" not in name}
    notebook = toy.notebook("02")
    inode = notebook.stat().st_ino
    assert toy.run("--only", "02", "--force").returncode == 0
    assert notebook.stat().st_ino != inode
    after = {name: data for name, data in toy.contents().items() if "/logs/" not in name}
    assert {name for name in before if before[name] != after[name]} <= {"results/embedded/run_times.json"}


def test_a_failing_cell_leaves_everything_as_it_was(toy: Toy) -> None:
    toy.write("02", OVERWRITE, "1 / 0")
    toy.write("03", 'store.write_text("value\\nnew\\n", out / "03_toy.csv")')
    before = toy.contents()
    done = toy.run()
    assert done.returncode == 1
    assert "02_toy: code cell 4: ZeroDivisionError: division by zero\n" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "ZeroDivisionError" in (toy.root / "results/embedded/logs/02_toy.log").read_text()
    assert "[4/5] 08_toy not started: it needs 02_toy, which failed" in done.stdout
    assert "[5/5] 00_toy not started: it needs 02_toy, which failed" in done.stdout
    after = toy.contents()
    changed = {name for name in after if after[name] != before.get(name) and "/logs/" not in name}
    # The sibling finished; nothing of the notebook that failed is there.
    assert changed - {"results/embedded/run_times.json"} == {"notebooks/03_toy.ipynb", "results/embedded/03_toy.csv"}
    assert stale(toy) == {"02", "08", "00"}


MORE = """if PROFILE == "full":
    store.write_text("svg", figures / "02_more.svg")
    store.write_text("value\\n1\\n", out / "02_more.csv")
    store.write_text("value\\n1\\n", out / "more" / "02.csv")
store.write_text("value\\n1\\n", out / "02_toy.csv")"""


def test_what_a_notebook_no_longer_writes_goes_when_it_has_finished(toy: Toy) -> None:
    """Its earlier tables and figures only: neither those of another notebook, nor a user's, nor parts of a sweep."""
    toy.write("02", MORE)
    assert toy.run("--only", "02,03").returncode == 0
    mine = {"results/embedded/02_mine.csv", "figures/embedded/02_mine.svg", "results/embedded/parts/k/0.parquet"}
    for name in mine:
        (toy.root / name).parent.mkdir(parents=True, exist_ok=True)
        (toy.root / name).write_text("mine")
    more = {name for name in names(toy) if "more" in name}
    assert more == {"figures/embedded/02_more.svg", "results/embedded/02_more.csv", "results/embedded/more/02.csv"}
    before = names(toy)
    toy.write("02", MORE.replace('"full"', '"smoke"'), "1 / 0")
    assert toy.run("--only", "02").returncode == 1
    assert names(toy) == before
    toy.write("02", MORE.replace('"full"', '"smoke"'))
    assert toy.run("--only", "02").returncode == 0
    assert names(toy) == before - more
    toy.write("02", MORE)
    assert toy.run("--only", "02").returncode == 0
    assert names(toy) == before


def test_a_mistake_of_the_user_is_shown_as_its_sentence(toy: Toy) -> None:
    toy.write("01", 'raise InputError("no such thing: do this")')
    done = toy.run("--only", "01")
    assert done.returncode == 1
    assert done.stderr.startswith("01_toy: code cell 3: no such thing: do this\n")


DIES = """import os
if not paths.Path({flag!r}).exists():
    store.write_text("", {flag!r})
    store.write_text("value\\nwrong\\n", out / "02_toy.csv")
    os.kill({who}, 9)
store.write_text("value\\n02\\n", out / "02_toy.csv")"""


@pytest.mark.parametrize(
    ("dies", "said"),
    [
        ("os.getpid()", "code cell 3: DeadKernelError: the kernel died (was there enough memory?)"),
        ("os.getppid()", "its process was killed (was there enough memory?)"),
    ],
    ids=["the kernel", "its process"],
)
def test_what_dies_as_for_want_of_memory_is_named_and_the_next_run_goes_on(toy: Toy, dies: str, said: str) -> None:
    before, flag = toy.contents(), str(toy.root / "died.txt")
    toy.write("02", DIES.format(flag=flag, who=dies))
    done = toy.run("--only", "02")
    assert done.returncode == 1 and done.stderr.startswith(f"02_toy: {said}\n"), done.stderr
    kept = {name: data for name, data in toy.contents().items() if name in before and name != "notebooks/02_toy.ipynb"}
    assert {name for name in kept if kept[name] != before[name]} <= {"results/embedded/logs/02_toy.log"}
    assert toy.run("--only", "02").returncode == 0
    assert (toy.root / "results/embedded/02_toy.csv").read_bytes() == before["results/embedded/02_toy.csv"]


def test_a_change_made_while_a_notebook_runs_is_kept(toy: Toy) -> None:
    toy.write("01", 'from pathlib import Path\nPath("01_toy.ipynb").write_text("mine")')
    done = toy.run("--only", "01")
    assert (done.returncode, toy.notebook("01").read_text()) == (1, "mine")
    assert "01_toy: it was changed while it ran; the change is kept, so run again" in done.stderr


def test_another_run_has_its_own_folders_and_parameters(toy: Toy) -> None:
    toy.write("01", 'print(SLUG, PAIRS)\nstore.write_text("x", out / "01_toy.csv")')
    before = toy.contents()
    assert toy.run("--only", "01", "--pairs", "20", "--name", "mine").returncode == 0
    after = toy.contents()
    assert {name: after[name] for name in before} == before
    executed = json.loads(after["results/mine/notebooks/01_toy.ipynb"])
    assert executed["cells"][2]["id"] == "injected-parameters"
    assert "".join(executed["cells"][4]["outputs"][0]["text"]) == "mine 20\n"
    assert json.loads(after["results/mine/manifest.json"])["pairs"] == 20
    assert "01_toy ..." in toy.run("--only", "01", "--pairs", "30", "--name", "mine").stdout.replace(
        "(last time", "..."
    )


@pytest.mark.parametrize("printed,status", [("a", 0), ("changed", 1)])
def test_nbval_compares_what_is_printed(toy: Toy, printed: str, status: int) -> None:
    text = toy.notebook("01").read_text()
    toy.notebook("01").write_text(text.replace('"a\\n"', f'"{printed}\\n"', 1))
    flags = [flag.replace("tests/", f"{ROOT}/tests/") for flag in checks.NBVAL]
    command = [sys.executable, "-m", "pytest", *flags, "notebooks/01_toy.ipynb"]
    done = subprocess.run(command, cwd=toy.root, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_everything_and_tears_nothing(toy: Toy, sent: signal.Signals) -> None:
    note = toy.root / "kernel.txt"
    slow = f'import os, time\nstore.write_text(str(os.getpid()), "{note}")\ntime.sleep(60)'
    toy.write("01", 'store.write_text("value\\nwrong\\n", out / "01_toy.csv")', slow)
    before = toy.contents()
    running = toy.start("--only", "01")
    until(note.exists)
    assert "another run is writing results/embedded" in toy.run("--only", "01").stderr
    running.send_signal(sent)
    _, errors = running.communicate(timeout=30)
    assert (running.returncode, "stopped; what finished is kept" in errors) == (130, True)
    assert "Traceback" not in errors
    after = {name: data for name, data in toy.contents().items() if "/logs/" not in name}
    assert after == {name: data for name, data in before.items() if "/logs/" not in name}
    kernel = int(note.read_text())
    until(lambda: not alive(kernel))
    assert not list(toy.root.rglob("stage*"))


def until(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
