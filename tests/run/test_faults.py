"""Kills, a full disk and damaged files: the next run goes on, and ends where an undisturbed run does."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from toys import CLAIMS, Toy, environment

from companion.base import files
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.mediation import sweeps
from companion.run import freshness, notebooks, runner

TIMES, MANIFEST = "results/embedded/run_times.json", "results/embedded/manifest.json"
SLOW = "_ = __import__('time').sleep(0.3)"
TABLE = '_ = [store.write_text("{0}\\n", out / "{0}_toy.csv"), store.write_text("svg", figures / "{0}_toy.svg")]'


FLAGS: dict[str, Any] = runner.DEFAULTS | {"MODEL": "full-0", "SLUG": "shared"}


def results(toy: Toy) -> dict[str, bytes]:
    """What must be equal in the end: everything but times and logs."""
    return {name: data for name, data in toy.contents().items() if "/logs/" not in name and "run_times" not in name}


def kill_after(toy: Toy, seconds: float, *flags: str) -> None:
    """SIGKILL to the runner alone, as the kernel does when memory is short."""
    running = toy.start(*flags)
    time.sleep(seconds)
    running.kill()
    running.communicate()


def disturbed(toy: Toy, kills: int) -> None:
    """Two notebooks, forced anew by a changed cell each time, killed at seeded moments; then run to the end."""
    for number in ("01", "02"):
        toy.write(number, SLOW, TABLE.format(number), SLOW)
    start = time.monotonic()
    assert toy.run("--only", "02").returncode == 0
    whole, expected = time.monotonic() - start, results(toy)
    moments = random.Random(0)
    for _ in range(kills):
        toy.write("01", SLOW, TABLE.format("01"), SLOW)  # unexecuted: both run again
        kill_after(toy, moments.uniform(0.0, whole), "--only", "02", "--force")
        for name, data in results(toy).items():  # at no moment half a file
            if name.endswith((".json", ".ipynb")):
                json.loads(data)
            elif name in expected and not name.endswith(".md"):
                assert data == expected[name], name
        assert toy.run("--list").returncode == 0
    done = toy.run("--only", "02")
    assert done.returncode == 0, done.stderr
    assert results(toy) == expected
    assert not list(toy.root.rglob("stage*")) and not list(toy.root.rglob(".0*"))


def test_a_killed_run_goes_on_and_ends_the_same(toy: Toy) -> None:
    disturbed(toy, kills=3)


@pytest.mark.slow
def test_twenty_killed_runs_go_on_and_end_the_same(toy: Toy) -> None:
    disturbed(toy, kills=20)


def test_a_killed_runner_leaves_nothing_running(toy: Toy) -> None:
    note = toy.root / "kernel.txt"
    toy.write("01", f'import os, time\nstore.write_text(str(os.getpid()), "{note}")\ntime.sleep(60)')
    running = toy.start("--only", "01")
    end = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    running.kill()
    running.communicate()
    kernel = Path("/proc") / note.read_text()
    while kernel.exists():
        assert time.monotonic() < end, "the kernel goes on without its runner"
        time.sleep(0.2)


def shrunk(toy: Toy, size: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """The command line where no file may grow beyond `size` bytes, as on a disk that is full."""
    command = [sys.executable, "-m", "companion.run.cli", *flags]
    return subprocess.run(
        command, cwd=toy.root, env=environment(PYTHONDONTWRITEBYTECODE="1"), capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip


LONG = 'store.write_text("value\\nlonger\\n" * 10_000, out / "02_toy.csv")'


@pytest.mark.parametrize(
    ("size", "cell", "said"),
    [
        (0, LONG, r"run_all\.sh: .*File too large.*: mend that; what finished is kept, .*"),
        (30_000, LONG, r"02_toy: code cell 3: OSError: .*File too large"),
        (30_000, 'print("longer " * 10_000)', r"02_toy: File too large: .* make room, or set TMPDIR .*"),
    ],
    ids=["nothing", "a table", "the notebook"],
)
def test_a_full_disk_is_one_clear_line_and_tears_nothing(toy: Toy, size: int, cell: str, said: str) -> None:
    """What has no room is the runner's first note, a table that a cell writes, or the executed notebook."""
    toy.write("02", cell)
    before = results(toy)
    done = shrunk(toy, size, "--only", "02")
    assert done.returncode in (1, 2) and re.match(said + "\n", done.stderr), done.stderr
    assert "Traceback" not in done.stderr and results(toy) == before
    assert toy.run("--only", "02").returncode == 0
    assert results(toy) != before


@pytest.mark.parametrize("flags", [(), ("--only", "01", "--force"), ("--shards", "2", "--force"), ("--figures",)])
def test_the_second_of_two_runs_into_one_folder_says_so_and_stops(toy: Toy, flags: tuple[str, ...]) -> None:
    before = toy.contents()
    with runner.only_run(toy.root / "results" / "embedded"):
        done = toy.run(*flags)
    assert (done.returncode, toy.contents()) == (2, before)
    assert done.stderr == "run_all.sh: another run is writing results/embedded: wait, or choose --name\n"


def test_a_disk_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(runner.fcntl, "flock", none)
    said = r"cannot be locked .*\(Function not implemented\): copy the repository to"
    with pytest.raises(InputError, match=said), runner.only_run(tmp_path):
        pass


DAMAGES = {
    "torn": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "foreign": lambda data: data + b"x\n",
}


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_every_damaged_file_is_made_again_or_named(toy: Toy, first: int) -> None:
    """Each file alone, then a run; with all three values of `first` each kind of damage meets each file."""
    expected, times = results(toy), toy.root / TIMES
    assert {MANIFEST, "results/claims.csv", "results/embedded/02_toy.csv", "figures/embedded/02_toy.svg"} <= set(
        expected
    )
    for place, name in enumerate([*sorted(expected), TIMES], start=first):
        path, kind = toy.root / name, list(DAMAGES)[place % len(DAMAGES)]
        whole = path.read_bytes()
        path.write_bytes(DAMAGES[kind](whole))
        done = toy.run()
        if name.startswith("notebooks/"):  # a source, which no run can make
            assert done.returncode == 2 and f"{name} is not valid JSON" in done.stderr, (name, kind)
            path.write_bytes(whole)
            continue
        assert (done.returncode, done.stderr) == (0, ""), (name, kind)
        assert results(toy) == expected, (name, kind)
        assert json.loads(times.read_text()).keys() <= {f"{number}_toy" for number in ("00", "01", "02", "03", "08")}
    assert toy.run("--list").stdout.count(" fresh ") == 5


def flipped(whole: bytes, chance: random.Random) -> bytes:
    """One to three changed bytes; now and then the end is missing, or something stands behind it."""
    data = bytearray(whole)
    for place in chance.sample(range(len(data)), chance.randint(1, 3)):
        data[place] ^= chance.randint(1, 255)
    cut = chance.randrange(len(data)) if chance.random() < 0.1 else len(data)
    return bytes(data[:cut]) + (chance.randbytes(9) if chance.random() < 0.1 else b"")


def measured() -> pd.DataFrame:
    """Thirty rows of effects as notebook 02 writes them."""
    numbers = np.random.default_rng(0).normal(size=30)
    made = {"str": [f"name {i % 4}" for i in range(30)], "int": range(30), "float": numbers}
    return pd.DataFrame({name: made[kind] for name, kind in files.EFFECTS.items()})


def test_a_table_with_changed_bytes_is_read_as_it_was_or_named(tmp_path: Path) -> None:
    path, chance = files.write_table(measured(), tmp_path / "02_layers.parquet"), random.Random(2)
    whole, named = path.read_bytes(), 0
    for _ in range(500):
        path.write_bytes(flipped(whole, chance))
        try:
            assert files.read_table(path, files.EFFECTS).equals(measured())
        except InputError as error:
            assert "02_layers.parquet" in str(error) and "\n" not in str(error)
            named += 1
    assert 400 < named < 500  # a changed byte may lie where nobody reads


def test_a_text_table_with_changed_bytes_is_read_or_named(tmp_path: Path) -> None:
    path, chance = files.write_table(measured(), tmp_path / "02_layers.csv"), random.Random(2)
    whole, named = path.read_bytes(), 0
    for _ in range(500):
        path.write_bytes(flipped(whole, chance))
        try:
            files.read_table(path, files.EFFECTS)
        except InputError:
            named += 1
    assert 0 < named < 500


def test_a_part_with_changed_bytes_is_read_as_it_was_or_measured_again(tmp_path: Path) -> None:
    path, chance = sweeps.write_part({"effects": measured()}, tmp_path, 3, ["halved"]), random.Random(2)
    whole, again = path.read_bytes(), 0
    for _ in range(500):
        path.write_bytes(flipped(whole, chance))
        found = sweeps.read_part(tmp_path, 3)
        assert found is None or found["effects"].equals(measured())
        again += found is None
    assert 400 < again < 500


@pytest.mark.parametrize(
    "damage",
    [
        lambda cells: cells.append(1), lambda cells: cells.append({}), lambda cells: cells[1].pop("source"),
        lambda cells: cells[1].update(source=3), lambda cells: cells[1].update(metadata=None),
        lambda cells: cells[2].update(outputs=[{}]), lambda cells: cells[1].update(metadata={"tags": 3}),
    ],
)  # fmt: skip
def test_a_notebook_of_another_shape_is_named(tmp_path: Path, damage: Any) -> None:
    toy = Toy(tmp_path)
    toy.write("01")
    path = toy.notebook("01")
    whole = notebooks.read_notebook(path)
    damage(whole["cells"])
    files.write_json(whole, path)
    with pytest.raises(InputError, match=r"01_toy\.ipynb is not a notebook as Jupyter writes it: its cell \d is none"):
        notebooks.read_notebook(path)
    files.write_json({"cells": []}, path)
    with pytest.raises(InputError, match="it has no metadata; restore the file"):
        notebooks.read_notebook(path)


def test_damaged_notes_and_files_at_once_are_made_again(toy: Toy) -> None:
    expected = results(toy)
    for place, name in enumerate(sorted(expected)):
        if not name.startswith("notebooks/"):
            (toy.root / name).write_bytes(DAMAGES[list(DAMAGES)[place % len(DAMAGES)]](expected[name]))
    for path in sorted((toy.root / "results").rglob(".state/*.json"))[::2]:
        path.write_bytes(b"[1, 2")
    done = toy.run()
    assert done.returncode == 0, done.stderr
    assert results(toy) == expected


def test_a_note_of_another_shape_only_costs_time(toy: Toy) -> None:
    for content in ({"key": 1}, {"key": "x", "outputs": [1]}, [], {"hashes": {"a": "b"}}, {"model": 5}):
        for path in (toy.root / "results/embedded/.state").glob("*.json"):
            path.write_text(json.dumps(content))
        done = toy.run("--list")
        assert (done.returncode, done.stderr, done.stdout.count(" stale ")) == (0, "", 5)


def test_a_changed_shared_file_is_made_again_by_its_notebook(toy: Toy) -> None:
    (toy.root / "results/claims.csv").write_text("mine\n")
    stale = [line[:2] for line in toy.run("--list").stdout.splitlines() if " stale " in line]
    assert stale == ["08"]


def test_what_two_runs_share_is_not_written_over_by_who_had_not_seen_the_other(toy: Toy) -> None:
    """Else the table of verdicts would lack those of the run that came first, and count as fresh."""
    shared = toy.root / "results" / "claims.csv"
    mine, other = shared.read_text(), f"_ = paths.Path({str(shared)!r}).write_text"
    toy.write("08", CLAIMS, f"{other}('theirs')")
    done = toy.run("--only", "08")
    assert done.returncode == 1 and "08_toy: a run of another name wrote results/claims.csv meanwhile" in done.stderr
    assert shared.read_text() == "theirs"
    toy.write("08", CLAIMS, f"{other}((paths.RESULTS / 'claims.csv').read_text())")  # the same: nobody is harmed
    assert toy.run("--only", "08").returncode == 0 and shared.read_text() == mine


def test_a_mixture_is_never_called_fresh(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    freshness.remember(tmp_path, "02", "key", [tmp_path / "a.csv"], {})
    assert freshness.is_fresh(tmp_path, "02", "key", {})
    freshness.forget(tmp_path, "02", [])  # before anything is published
    assert not freshness.is_fresh(tmp_path, "02", "key", {})


def test_what_a_killed_run_was_about_to_write_stays_known(tmp_path: Path) -> None:
    """Killed between its first file and its note, the next run still removes what it does not write itself."""
    old, new, both = (tmp_path / f"{name}.csv" for name in ("old", "new", "both"))
    for path in (old, new, both, tmp_path / "mine.csv"):
        path.write_text("a")
    freshness.remember(tmp_path, "02", "key", [old, both], {})
    assert freshness.forget(tmp_path, "02", [new, both]) == [old]
    assert set(freshness.forget(tmp_path, "02", [both])) == {old, new}
    freshness.remember(tmp_path, "03", "key", [old], {})  # which another notebook writes by now
    assert freshness.forget(tmp_path, "02", [both]) == [new]


def test_the_executing_process_ends_with_its_runner() -> None:
    code = "import threading, time; from companion.run import notebooks as e; e.end_with_the_runner()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None and process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=20) == -signal.SIGKILL


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_runner_that_is_killed_or_stopped_leaves_no_shard_running(tmp_path: Path, sent: signal.Signals) -> None:
    code = f"from companion.run import shards; shards.measure({FLAGS!r}, 2, ['02', '03'])"
    variables = environment(COMPANION_RESULTS=str(tmp_path), COMPANION_FIGURES=str(tmp_path))
    running = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    end = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.parquet"))) < 2:  # at work
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.1)
    shards = [Path("/proc") / pid for pid in children.read_text().split()]
    running.send_signal(sent)
    running.wait()
    assert len(shards) == 2
    end = time.monotonic() + 5
    try:
        while any(shard.exists() for shard in shards):
            assert time.monotonic() < end, "a shard goes on without its runner"
            time.sleep(0.1)
    finally:
        for shard in shards:
            if shard.exists():
                os.kill(int(shard.name), signal.SIGKILL)


@pytest.mark.parametrize(
    "words", [{"stdin": subprocess.PIPE}, {"stdin": subprocess.DEVNULL, "start_new_session": True}]
)
def test_a_shard_started_by_hand_needs_no_runner(words: dict[str, Any]) -> None:
    code = "from companion.run import notebooks; print(notebooks.has_runner())"
    done = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, **words)
    assert done.communicate()[0] == "False\n"


def test_a_notebook_started_by_hand_ends_nobody_else() -> None:
    """Its runner's pipe ends a notebook with its group; an empty input of whoever typed the command must not."""
    words = f"{sys.executable} -m companion.run.notebooks nowhere.ipynb x.ipynb . '{{}}' 1 < /dev/null; echo went on"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, start_new_session=True)
    assert "nowhere.ipynb" in done.stdout + done.stderr and done.stdout.endswith("went on\n")
