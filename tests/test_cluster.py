"""Shards as processes of this machine and as jobs of submitit's local executor."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import environment

from helpers import cluster, shard_run
from helpers.errors import InputError
from helpers.paths import ROOT

FLAGS = {"MODEL": "full-0", "PROMPTS": "embedded", "SLUG": "shared", "DEVICE": "cpu", "DTYPE": "float32"}
FLAGS |= {"PROFILE": "smoke", "PAIRS": 10}  # type: ignore[dict-item]


def started(tmp_path: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    variables = environment(COMPANION_RESULTS=str(tmp_path / "results"), COMPANION_FIGURES=str(tmp_path / "figures"))
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )


def test_processes_share_the_batches(tmp_path: Path) -> None:
    code = f"from helpers import shard_run; print(shard_run.measure({FLAGS!r}, 2, ['03']))"
    first, second = (started(tmp_path, "-c", code).stdout.splitlines() for _ in range(2))
    made = [int(line.split()[4]) for line in first[1:3]]
    assert first[0] == "sweeps of 03 in 2 shards ..." and first[3] == "0"
    assert min(made) > 0 and abs(made[0] - made[1]) <= 1
    assert len(list((tmp_path / "results/shared/parts").rglob("*.parquet"))) == sum(made)
    assert [line.split(": ")[1] for line in second[1:3]] == [f"0 batches measured, {n} were there" for n in made]


def test_a_shard_that_fails_is_named(tmp_path: Path) -> None:
    code = f"from helpers import shard_run; print(shard_run.measure({FLAGS | {'MODEL': 'nowhere'}!r}, 1, ['03']))"
    done = started(tmp_path, "-c", code)
    assert done.stdout.splitlines()[-1] == "1" and "shard_1: no model 'nowhere'" in done.stderr


def test_jobs_of_the_local_executor(tmp_path: Path) -> None:
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed: python -m pip install -r requirements-cluster.in")
    words = ["--model", "full-0", "--profile", "smoke", "--pairs", "10", "--name", "shared", "--only", "03"]
    done = started(tmp_path, "-m", "helpers.cluster", "--executor", "local", "--shards", "2", "--", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batches measured, 0 were there") == 2
    failing = started(tmp_path, "-m", "helpers.cluster", "--executor", "local", "--shards", "0", "--", *words)
    assert "--shards 0: expected 1 to 1000" in failing.stderr and "Traceback" not in failing.stderr


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match="expected KEY=VALUE"):
        cluster.settings(["partition"])


def test_gpus_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert shard_run.processes("cuda", 8) == 2
    assert [shard_run.gpu("cuda", shard) for shard in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": name} for name in "46"]
    assert json.dumps(shard_run.gpu("cpu", 1)) == "{}"
