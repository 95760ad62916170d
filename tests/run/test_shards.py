"""Sweeps shared among jobs of submitit: the local executor, and what is said of whatever goes wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from toys import environment

from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.run import cli, runner, shards

WORDS = ["--model", "full-0", "--profile", "smoke", "--pairs", "10", "--name", "shared"]
Shared = Callable[..., tuple[bool, Mock]]
SHARE = """from companion.run import cli, runner, shards
asked = cli.parse({words!r})
print(shards.measure_shards(runner.make_plan(cli.resolved(asked)), ["01", "02", "03"], asked))"""


def started(tmp_path: Path, *words: str) -> "subprocess.Popen[str]":
    """The sweeps of `WORDS` and these words in a process of its own, as ./run_all.sh measures them before its notebooks."""
    code = SHARE.format(words=[*WORDS, "--executor", "local", *words])
    folders = {"COMPANION_RESULTS": str(tmp_path / "results"), "COMPANION_FIGURES": str(tmp_path / "figures")}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**folders, PYTHONPATH=os.environ.get("PYTHONPATH", "")),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_jobs_on_this_machine_share_the_batches_and_end_with_the_runner(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install -r requirements-cluster.in")

    def n_parts(after: float) -> int:
        time.sleep(after)
        return len(list((tmp_path / "results" / "shared" / "parts").rglob("*.zip")))

    running, end = started(tmp_path, "--shards", "2"), time.monotonic() + 120
    while n_parts(after=0.1) < 2:  # at work
        assert time.monotonic() < end and running.poll() is None, running.communicate()
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert n_parts(after=3) == n_parts(after=3) > 0, "a job goes on without its runner"
    out, errors = started(tmp_path, "--shards", "2").communicate()
    lines = out.splitlines()
    assert lines[0].startswith("2 local jobs for the sweeps of 02, 03; logs in ") and lines[-1] == "True", errors
    made, found = (sum(int(line.split()[place]) for line in lines[1:3]) for place in (6, 9))
    assert made > 0 and found > 0
    out, errors = started(tmp_path, "--shards", "3").communicate()  # another number finds the same parts
    assert out.count(": 0 batches measured") == 3 and "Traceback" not in errors


def test_without_submitit_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"--shards needs submitit: python -m pip install -r requirements-cluster\.in"):
        cli.run_command(cli.parse(["--shards=2"]))  # before anything is fetched


def job(tmp_path: Path, number: str, error: BaseException | None = None, log: str = "") -> SimpleNamespace:
    path = tmp_path / f"{number}.err"
    path.write_text(log)
    made = {"exception": lambda: error, "result": lambda: f"shard {number}"}
    return SimpleNamespace(job_id=number, paths=SimpleNamespace(stderr=path), **made)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shared:
    """Measure the sweeps of a run by a stand-in for submitit's executor on Slurm; no variable outlives the test."""
    for name in shards.notebooks.DETERMINISTIC:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "RESULTS", tmp_path)

    def measure(*words: str, wrong: Exception | None = None, jobs: Any = ()) -> tuple[bool, Mock]:
        executor = Mock(**{"map_array.return_value": list(jobs), "map_array.side_effect": wrong})
        monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=lambda folder, cluster: executor))
        asked = cli.parse([*WORDS, "--executor", "slurm", "--shards", "2", *words])
        plan = runner.make_plan(cli.resolved(asked))
        numbers = runner.with_needs(cli.chosen_notebooks(asked.only), plan.paths)
        return shards.measure_shards(plan, numbers, asked), executor

    return measure


def test_jobs_are_given_what_a_run_is(shared: Shared, tmp_path: Path) -> None:
    """`--only` leaves sweeps out that are not asked for, `--force` removes parts, and one thread goes to a shipped model."""
    part = tmp_path / "shared" / "parts" / "one.zip"
    part.parent.mkdir(parents=True)
    part.write_text("a part")
    words = ("--set", "timeout_min=5", "--set", "slurm_partition=gpu", "--only", "02")
    done, executor = shared(*words, jobs=[job(tmp_path, "7_0"), job(tmp_path, "7_1")])
    executor.update_parameters.assert_called_once_with(timeout_min=5, slurm_partition="gpu")
    assert done and part.exists()
    (parameters, wanted, shard, n, variables, watched), last = zip(*executor.map_array.call_args.args[1:], strict=True)
    assert (parameters["MODEL"], wanted, shard, n, last[2]) == ("full-0", ["02"], 0, 2, 1)
    assert (variables, watched) == ({"OMP_NUM_THREADS": "1"}, None)
    assert not shared("--only", "01")[1].map_array.called
    assert shared("--force", jobs=[])[0] and not part.exists()


def test_gpus_are_dealt_out_and_cores_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 8)

    def variables(device: str, executor: str = "local") -> list[dict[str, str]]:
        return shards._variables({"DEVICE": device, "MODEL": "/my/model"}, executor, 4)

    assert variables("cuda") == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]
    assert variables("cuda:1") == [{"CUDA_VISIBLE_DEVICES": "4,6"}]
    assert variables("cpu") == [{"OMP_NUM_THREADS": "2"}] * 4 and variables("cuda", "slurm") == [{}] * 4


def test_what_keeps_jobs_from_being_submitted_is_one_sentence(shared: Shared) -> None:
    for wrong, message in (
        (RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?'), 'Could not detect "srun"'),
        (NameError("'x' need to be prefixed.\nKnown executors: slurm"), "'x' need to be prefixed.;"),
        (AssertionError(), "submitted: AssertionError;"),
    ):
        with pytest.raises(InputError, match=r"the jobs could not be submitted: .*see --set and --executor") as error:
            shared(wrong=wrong)
        assert message in str(error.value)


def test_a_failed_job_says_why_and_where_its_log_is(shared, capsys, tmp_path):
    said = "Job 7_2 (task: 0) with path p\nhas not produced any output (state: FAILED)"
    memory = "Traceback (most recent call last):\n  x: y\ntorch.OutOfMemoryError: no room\nsee the page\n"
    ours = "Traceback\n  File x\ncompanion.base.errors.InputError: no model\n\nsee above"
    failed = [("long", memory), ("long", ours), (said, "")]
    assert not shared(jobs=[job(tmp_path, f"7_{n}", RuntimeError(one), log) for n, (one, log) in enumerate(failed)])[0]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "job 7_0: torch.OutOfMemoryError: no room" and lines[1].endswith("7_0.err")
    assert lines[2] == "job 7_1: no model" and lines[4].startswith("job 7_2: has not produced any output")


def test_nobody_writes_meanwhile(shared, tmp_path):
    def second() -> BaseException:
        with pytest.raises(InputError, match="another run is writing"), runner.only_run(tmp_path / "shared"):
            pass
        raise KeyboardInterrupt

    waiting = job(tmp_path, "7_0")
    waiting.exception = second
    with pytest.raises(KeyboardInterrupt):
        shared(jobs=[waiting])
    with runner.only_run(tmp_path / "shared"), pytest.raises(InputError, match="another run is writing"):
        shared()
