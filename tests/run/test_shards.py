"""Shards as processes of this machine and as jobs of submitit's local executor."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toys import environment

from companion.base import hub
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.run import cluster, flags, runner, shards
from tests.nine_families import judge_folder

FLAGS = {"MODEL": "full-0", "PROMPTS": "embedded", "SLUG": "shared", "DEVICE": "cpu", "DTYPE": "float32"}
FLAGS |= {"PROFILE": "smoke", "PAIRS": 10}  # type: ignore[dict-item]


def started(tmp_path: Path, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
    folders = {"COMPANION_RESULTS": str(tmp_path / "results"), "COMPANION_FIGURES": str(tmp_path / "figures")}
    variables = environment(**folders, **more)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )


def test_processes_share_the_batches(tmp_path: Path) -> None:
    code = f"from companion.run import shards; print(shards.measure({FLAGS!r}, 2, ['03']))"
    first, second = (started(tmp_path, "-c", code).stdout.splitlines() for _ in range(2))
    made = [int(line.split()[4]) for line in first[1:3]]
    assert first[0] == "sweeps of 03 in 2 shards ..." and first[3] == "0"
    assert min(made) > 0 and abs(made[0] - made[1]) <= 1
    assert len(list((tmp_path / "results/shared/parts").rglob("*.parquet"))) == sum(made)
    assert [line.split(": ")[1] for line in second[1:3]] == [f"0 batches measured, {n} were there" for n in made]


def test_a_shard_that_fails_is_named(tmp_path: Path) -> None:
    code = f"from companion.run import shards; print(shards.measure({FLAGS | {'MODEL': 'nowhere'}!r}, 1, ['03']))"
    done = started(tmp_path, "-c", code)
    assert done.stdout.splitlines()[-1] == "1" and "shard_1: no model 'nowhere'" in done.stderr


def test_a_shard_that_can_write_nothing_says_what_may_be_wrong(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    done = started(
        tmp_path, "-c", f"{full}\nfrom companion.run import shards; print(shards.measure({FLAGS!r}, 1, ['03']))"
    )
    assert done.stdout.splitlines()[-1] == "1", done.stderr
    assert "shard_1: its process ended with status 1 and wrote nothing into its log (is there room" in done.stderr


def test_jobs_of_the_local_executor(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("submitit")
    if spec is None or spec.origin is None:
        pytest.skip("submitit is not installed: python -m pip install -r requirements-cluster.in")
    there = {"PYTHONPATH": str(Path(spec.origin).parents[1])}  # it may lie outside the environment
    words = ["--model", "full-0", "--profile", "smoke", "--pairs", "10", "--name", "shared", "--only", "03"]
    done = started(
        tmp_path, "-m", "companion.run.cluster", "--executor", "local", "--shards", "2", "--", *words, **there
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batches measured, 0 were there") == 2
    failing = started(
        tmp_path, "-m", "companion.run.cluster", "--executor", "local", "--shards", "0", "--", *words, **there
    )
    assert "--shards 0: expected 1 to 1000" in failing.stderr and "Traceback" not in failing.stderr


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match="expected KEY=VALUE"):
        cluster.settings(["partition"])


class Executor:
    """submitit's executor, whose jobs are handed in by the test, and which says what it was asked for."""

    asked: dict[str, Any]

    def __init__(self, wrong: Exception | None, jobs: list[SimpleNamespace]) -> None:
        self.wrong, self.jobs, self.asked, self.calls = wrong, jobs, {}, list[tuple[Any, ...]]()

    def update_parameters(self, **asked: Any) -> None:
        self.asked = asked

    def map_array(self, work: Callable[..., str], *every: Any) -> list[SimpleNamespace]:
        if self.wrong is not None:
            raise self.wrong
        self.calls = list(zip(*every, strict=True))
        return self.jobs


def job(tmp_path: Path, number: str, error: BaseException | None = None, log: str = "") -> SimpleNamespace:
    """A finished job, or one that failed, with its log."""
    path = tmp_path / f"{number}.err"
    path.write_text(log)

    def exception() -> BaseException | None:
        if isinstance(error, KeyboardInterrupt):
            raise error
        return error

    said = f"shard {number}: 3 batches measured, 0 were there"
    return SimpleNamespace(
        job_id=number, paths=SimpleNamespace(stderr=path), exception=exception, result=lambda: said, cancel=lambda: None
    )


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Executor]:
    """A stand-in for the library; what runs are made of is left to the real code, and no variable outlives the test."""
    for name in (*cluster.launch.quiet(), "OMP_NUM_THREADS", hub.JUDGE, hub.TRUST):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    for module in (cluster, cluster.runner):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cluster.preflight, "check_pairs", lambda *asked: [f"pairs of {asked} looked at"])
    monkeypatch.chdir(ROOT)

    def install(wrong: Exception | None = None, jobs: list[SimpleNamespace] | None = None) -> Executor:
        executor = Executor(wrong, jobs or [])
        library = SimpleNamespace(AutoExecutor=lambda folder, cluster: executor)
        monkeypatch.setitem(sys.modules, "submitit", library)
        return executor

    return install


WORDS = ["--shards", "2", "--", "--model", "full-0", "--profile", "smoke", "--name", "stub-of-a-cluster"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (RuntimeError('Could not detect "srun", are you indeed on a slurm cluster?'), 'Could not detect "srun"'),
        (NameError("Parameter 'x' need to be prefixed.\nKnown executors: slurm, local"), "Parameter 'x' need to be"),
        (AssertionError(), "submitted: AssertionError;"),
    ],
)
def test_what_keeps_jobs_from_being_submitted_is_one_line(
    submitit: Callable[..., Executor], capsys: pytest.CaptureFixture[str], wrong: Exception, message: str
) -> None:
    submitit(wrong)
    assert flags.run_with_flags("companion.run.cluster", cluster.main, WORDS) == 2
    error = capsys.readouterr().err
    assert error.startswith("companion.run.cluster: the jobs could not be submitted: ") and message in error
    assert error.count("\n") == 1 and "Known executors" not in error


def test_jobs_are_given_the_flags_of_a_run(
    submitit: Callable[..., Executor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge and trust in foreign code reach the jobs by variables; --only leaves sweeps out that are not asked for."""
    executor = submitit(jobs=[job(tmp_path, "7_0"), job(tmp_path, "7_1")])
    judge = str(judge_folder(tmp_path / "judge"))
    flags = ["--trust-remote-code", "--judge", judge, "--only", "02"]
    assert cluster.main(["--set", "timeout_min=5", *WORDS, *flags]) == 0
    assert executor.asked == {"timeout_min": 5}
    assert "pairs of ('full-0', 'embedded', 0, 'smoke') looked at" in capsys.readouterr().out
    (parameters, shard, n, wanted), last = executor.calls
    assert (parameters["MODEL"], shard, n, wanted, last[1]) == ("full-0", 0, 2, ["02"], 1)
    assert (hub.trusts_code(), os.environ[hub.JUDGE]) == (True, judge)
    assert cluster.main([*WORDS, "--only", "01"]) == 0 and not hub.trusts_code()
    with pytest.raises(InputError, match="--force behind -- means nothing here"):
        cluster.main([*WORDS, "--force"])


def test_while_jobs_are_waited_for_nobody_else_writes_into_the_run(
    submitit: Callable[..., Executor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second says so and submits nothing; Ctrl-C ends the waiting, and with it the lock."""
    run = tmp_path / "results" / "stub-of-a-cluster"
    executor = submitit(jobs=[job(tmp_path, "7_0")])
    with runner.only_run(run):
        assert flags.run_with_flags("companion.run.cluster", cluster.main, WORDS) == 2
    assert "stub-of-a-cluster: wait, or choose --name" in capsys.readouterr().err and not executor.calls

    def second() -> BaseException:
        with pytest.raises(InputError, match="another run is writing"), runner.only_run(run):
            pass
        raise KeyboardInterrupt

    executor.jobs[0].exception = second
    assert flags.run_with_flags("companion.run.cluster", cluster.main, WORDS) == 130
    assert "its jobs go on" in capsys.readouterr().err and executor.calls
    with runner.only_run(run):
        pass


def test_names_are_resolved_before_a_job_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the device there, all is fetched; without it, the caches must have it, and a sentence says what they lack."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COMPANION_CACHE", str(tmp_path / "companion"))
    monkeypatch.setattr(cluster.inputs, "fetched", lambda found, given: {**found, "MODEL": "fetched"})
    assert cluster.ready(flags.flags(["--model", "org/tiny"]))["MODEL"] == "fetched"
    for words, message in (
        (["--model", "org/tiny"], "org/tiny is not in the hub's cache yet"),
        (["--model", "full-0", "--judge", "org/judge"], "org/judge is not in the hub's cache yet"),
        (["--model", "full-0", "--prompts", "xstest"], "the prompt set xstest is not made for full-0 yet"),
    ):
        with pytest.raises(InputError, match=message):
            cluster.ready(flags.flags([*words, "--device", "cuda:99"]))
    hub.choose_judge(None)


def test_a_failed_job_says_why_and_where_its_log_is(
    submitit: Callable[..., Executor], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = "Traceback (most recent call last):\n  x: y\ntorch.OutOfMemoryError: no room\nsee the page\n\n--- end ---\n"
    said = "Job 7_1 (task: 0) with path p\nhas not produced any output (state: FAILED)"
    failed = [job(tmp_path, "7_0", RuntimeError("long"), log), job(tmp_path, "7_1", RuntimeError(said))]
    submitit(jobs=failed)
    assert cluster.main(WORDS) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "job 7_0: torch.OutOfMemoryError: no room" and lines[1].endswith(str(tmp_path / "7_0.err"))
    assert lines[2] == "job 7_1: Job 7_1 (task: 0) with path p" and lines[4].startswith("2 of 2 jobs failed")


def test_ctrl_c_is_a_line_that_says_what_becomes_of_the_jobs(
    submitit: Callable[..., Executor], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    submitit(jobs=[job(tmp_path, "7_0", KeyboardInterrupt())])
    assert flags.run_with_flags("companion.run.cluster", cluster.main, WORDS) == 130
    assert "stopped; its jobs go on (scancel 7 ends them)" in capsys.readouterr().err
    assert flags.run_with_flags("companion.run.cluster", cluster.main, ["--executor", "local", *WORDS]) == 130
    assert "stopped; so are its jobs; what finished is kept" in capsys.readouterr().err


def test_gpus_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert shards.processes("cuda", 8) == 2
    assert [shards.gpu("cuda", shard) for shard in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": name} for name in "46"]
    assert json.dumps(shards.gpu("cpu", 1)) == "{}"
