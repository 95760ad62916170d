"""Kills, a full disk, damaged files, two runs at once: one clear line, and the next run ends where an undisturbed one does."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from toys import Toy, environment

from companion.base import files
from companion.base.errors import InputError
from companion.mediation import sweeps

TIMES = "results/embedded/run_times.json"
SLOW = "import os, time\n_ = files.write_text(str(os.getpid()), {!r})\ntime.sleep(180)"  # longer than anybody waits for its end


def until(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def at_work(toy: Toy) -> tuple["subprocess.Popen[str]", list[int]]:
    """A run of 02 and 03 side by side, both in their third cell after they wrote something, and their kernels' processes."""
    notes = [toy.root / f"kernel_{number}.txt" for number in ("02", "03")]
    for number, note in zip(("02", "03"), notes, strict=True):
        toy.write(number, f'files.write_text("wrong", out / "{number}_toy.csv")', SLOW.format(str(note)))
    running = toy.start("--only", "02,03", "--jobs", "2")
    until(lambda: all(note.exists() for note in notes) or running.poll() is not None, "no kernel began")
    return running, [int(note.read_text()) for note in notes]


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").exists() and " Z " in Path(f"/proc/{process}/stat").read_text()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_tears_nothing_and_leaves_nothing_running(toy: Toy, sent: signal.Signals) -> None:
    expected = toy.contents()  # what the next run should end with
    running, kernels = at_work(toy)
    assert "another run is writing results/embedded" in toy.run("--only", "01").stderr
    running.send_signal(sent)
    _, errors = running.communicate(timeout=60)
    if sent != signal.SIGKILL:
        assert (running.returncode, "stopped; what finished is kept" in errors) == (130, True)
        assert "Traceback" not in errors and not list(toy.root.rglob("stage*"))
    until(lambda: all(map(gone, kernels)), "a kernel goes on without its runner", seconds=45)
    now = toy.contents()
    assert {name for name in expected if now[name] != expected[name]} == {f"notebooks/0{n}_toy.ipynb" for n in (2, 3)}
    for number in ("02", "03"):
        toy.write(number)
    done = toy.run("--only", "02,03")
    assert done.returncode == 0 and toy.contents() == expected and not list(toy.root.rglob("stage*")), done.stderr


LONG = 'files.write_text("value\\nlonger\\n" * 10_000, out / "02_toy.csv")'


@pytest.mark.parametrize(
    ("size", "cell", "said"),
    [
        (0, LONG, r"run_all\.sh: .*File too large.*: mend that; what finished is kept, .*"),
        (30_000, LONG, r"02_toy: code cell 3: OSError: .*File too large"),
        (30_000, 'print("longer " * 10_000)', r"02_toy: OSError: .*File too large"),
    ],
    ids=["nothing", "a table", "the notebook"],
)
def test_a_full_disk_is_one_clear_line_and_tears_nothing(toy: Toy, size: int, cell: str, said: str) -> None:
    """What has no room is the runner's first file, a table that a cell writes, or the executed notebook."""
    toy.write("02", cell)
    before = toy.contents()
    done = subprocess.run(
        [sys.executable, "-m", "companion.run.cli", "--only", "02"], cwd=toy.root,
        env=environment(PYTHONDONTWRITEBYTECODE="1"), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert done.returncode in (1, 2) and re.match(said + "\n", done.stderr), done.stderr
    assert "Traceback" not in done.stderr and toy.contents() == before
    assert toy.run("--only", "02").returncode == 0


DIES = """import os
if not paths.Path({flag!r}).exists():
    files.write_text("", {flag!r})
    os.kill({who}, 9)
_ = files.write_text("value\\n02\\n", out / "02_toy.csv")"""
KILLED = {
    "os.getpid()": "code cell 3: DeadKernelError: the kernel died (was there enough memory?)",
    "os.getppid()": "its process was killed (was there enough memory?)",
}


@pytest.mark.parametrize("dies", KILLED)
def test_what_dies_as_for_want_of_memory_is_named_and_the_next_run_goes_on(toy: Toy, dies: str) -> None:
    toy.write("02", DIES.format(flag=str(toy.root / "died.txt"), who=dies))
    before = toy.contents()
    done = toy.run("--only", "02")
    assert done.returncode == 1 and done.stderr.startswith(f"02_toy: {KILLED[dies]}\n"), done.stderr
    assert toy.contents() == before and toy.run("--only", "02").returncode == 0


def test_a_change_made_while_a_notebook_runs_is_kept_and_a_folder_that_cannot_be_written_is_one_line(toy: Toy) -> None:
    (toy.root / "results" / "mine").write_text("a file, where the run's folder should be")
    done = toy.run("--only", "01", "--name", "mine", "--pairs", "20")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "mend that; what finished is kept" in done.stderr
    toy.write("01", 'from pathlib import Path\n_ = Path("01_toy.ipynb").write_text("mine")')
    done = toy.run("--only", "01")
    assert (done.returncode, toy.notebook("01").read_text()) == (1, "mine")
    assert "01_toy: it was changed while it ran; the change is kept, so run again" in done.stderr


DAMAGES = [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"x\n"]  # torn, empty, foreign


def test_damaged_files_and_notes_are_made_again_or_named(toy: Toy) -> None:
    expected = toy.contents()
    for place, name in enumerate([*sorted(expected), TIMES]):
        if not name.startswith("notebooks/"):
            (toy.root / name).write_bytes(DAMAGES[place % 3]((toy.root / name).read_bytes()))
    notes = sorted((toy.root / "results/embedded/.state").glob("*.json"))
    for path, content in zip(notes, ["[1, 2", '{"key": 1}', "[]"] * 9, strict=False):
        path.write_text(content)
    listed = toy.run("--list")
    assert (listed.returncode, listed.stderr) == (0, "")
    done = toy.run()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert toy.contents() == expected
    toy.notebook("02").write_bytes(b"{")  # a source, which no run can make
    assert "02_toy.ipynb is not valid JSON" in toy.run().stderr


def flipped(whole: bytes, chance: random.Random) -> bytes:
    """One to three changed bytes; now and then the end is missing, or something stands behind it."""
    data = bytearray(whole)
    for place in chance.sample(range(len(data)), chance.randint(1, 3)):
        data[place] ^= chance.randint(1, 255)
    cut = chance.randrange(len(data)) if chance.random() < 0.1 else len(data)
    return bytes(data[:cut]) + (chance.randbytes(9) if chance.random() < 0.1 else b"")


def test_measurements_with_changed_bytes_are_read_as_they_were_or_named_or_made_again(tmp_path: Path) -> None:
    """Parquet and the parts of a sweep have checksums inside; a changed byte may lie where nobody reads."""
    values = {"str": [f"name {i % 4}" for i in range(30)], "int": range(30), "float": np.linspace(-1, 1, 30) ** 3}
    measured = pd.DataFrame({name: values[kind] for name, kind in files.EFFECTS.items()})
    table = files.write_table(measured, tmp_path / "02_layers.parquet")
    part, chance = sweeps.write_part({"effects": measured}, tmp_path, 3, ["halved"]), random.Random(2)
    whole, named, again = (table.read_bytes(), part.read_bytes()), 0, 0
    for _ in range(300):
        for path, data in zip((table, part), whole, strict=True):
            path.write_bytes(flipped(data, chance))
        try:
            assert files.read_table(table, files.EFFECTS).equals(measured)
        except InputError as error:
            assert table.name in str(error) and "\n" not in str(error)
            named += 1
        found = sweeps.read_part(tmp_path, 3)
        assert found is None or found["effects"].equals(measured)
        again += found is None
    assert 240 < named < 300 and again > 240
