"""The benchmarks at a tiny shape: they run, agree with each other, and resume."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import bound, faults, gpu, peers, scaling, sweeps
from benchmarks.shapes import QUOTED, SMOKE, Job, Workload, workloads
from companion.base import paths
from companion.base.errors import InputError


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path / "results" / "benchmarks"


def test_peers_agree_and_absent_ones_are_skipped(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda package: package in ("torch", "transformer_lens"))
    peers.main(["--shape", "smoke", "--seconds", "0.01"])
    assert "nnsight: not installed, skipped" in capsys.readouterr().out
    table = pd.read_csv(results / "peers_smoke.csv")
    assert set(table.tool) == {"this repository", "arithmetic", "plain hooks", "TransformerLens"}
    assert table.largest_difference.max() < 1e-3
    assert table.groupby("workload").size().nunique() == 1
    assert {"processor", "threads", "torch", "version"} <= set(table.columns)
    assert (results.parent.parent / "figures" / "benchmarks" / "peers_smoke.png").is_file()


def test_a_peer_with_other_numbers_is_an_error(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, package = peers.TOOLS["plain hooks"]

    def wrong(setting):
        run = make(setting)
        return lambda jobs: run(jobs) + 1

    monkeypatch.setitem(peers.TOOLS, "plain hooks", (wrong, package))
    with pytest.raises(InputError, match="plain hooks is off by"):
        peers.main(["--shape", "smoke", "--seconds", "0.01"])


def test_scaling(results: Path) -> None:
    scaling.main(["--shape", "smoke"])
    table = pd.read_csv(results / "scaling_smoke.csv")
    assert table.factor.nunique() == 5
    assert (table.bound > 0).all()
    assert (table.groupby("factor").bound.apply(list).apply(lambda b: b == sorted(b))).all()


def test_whole_sweeps_are_timed_where_every_token_may_change(results: Path) -> None:
    sweeps.main(["--shape", "smoke"])
    table = pd.read_csv(results / "sweeps_smoke.csv")
    assert len(table) == 8 and (table.seconds > 0).all() and (table.operations > 0).all()
    assert (table.groupby(["sweep", "treatment"]).operations.apply(list).apply(lambda n: n == sorted(n))).all()
    for pair in sweeps.study(SMOKE, "T1").pairs:  # else fewer cells would be computed than the formula counts
        assert (pair.control != pair.treated).tolist() == [True] + [False] * (SMOKE.n_pos - 1)


def test_the_gpu_study_resumes(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", "--batch", "2", "--minutes", "0"])
    assert stopped.value.code == 3
    gpu.main(["--device", "cpu", "--batch", "2"])
    first = capsys.readouterr().out
    assert "recheck 2:" in first
    gpu.main(["--device", "cpu", "--batch", "2"])
    assert "recheck 2:" not in capsys.readouterr().out
    table = pd.read_csv(results / "gpu_cpu-float32.csv").set_index("part")
    assert (table.pairs == 4).all()
    assert table.interventions.recheck == 500
    (results / "gpu" / "cpu-float32" / "screen-0.json").unlink()
    (results / "gpu" / "cpu-float32" / "recheck-0.json").unlink()
    with pytest.raises(InputError, match="needs the part screen before it"):
        gpu.main(["--device", "cpu", "--batch", "2", "--parts", "recheck"])


def test_the_bound_counts_what_an_exact_answer_needs() -> None:
    by_name = {work.name: bound.minimal_operations(QUOTED, work) for work in workloads(QUOTED)}
    random, minimal = (by_name[f"layers and modules, every token{end}"] for end in ("", ", minimal pairs"))
    assert 3 < random / minimal < 4.5
    # One neuron of layer 10 of 12, last token: one layer of 3.16 million weights and the unembedding, for 16 pairs.
    one = Workload("one", (Job("neuron", 10, 47, 5),))
    assert bound.minimal_operations(QUOTED, one) == 2 * 16 * (4 * 512**2 + 3 * 512 * 1376 + 512 * 32_000)
    assert bound.product_rate(SMOKE, seconds=0.01) > 1e8


@pytest.mark.parametrize(
    ("code", "met"),
    [
        ("print('[2/2] 02_b ...', flush=True); time.sleep(60)", True),
        ("print('[2/2] 02_b ... 1 s', flush=True); time.sleep(60)", False),  # it has finished
        ("print('[2/2] 02_b ... ', end='', flush=True)", False),  # the process has ended
        ("print('[2/2] 02_b fresh, skipped', flush=True)", False), ("pass", False),
    ],
)  # fmt: skip
def test_a_kill_that_disturbs_nothing_is_counted_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, met: bool
) -> None:
    monkeypatch.setattr(faults, "_command", lambda flags, name: [sys.executable, "-c", f"import time; {code}"])
    found, line = faults._kill(tmp_path, [], "02_b", 0.3)
    assert found == met and line.startswith("too late: ") != met


def test_each_kill_falls_into_a_notebook_and_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, float]] = []
    monkeypatch.setattr(faults, "_kill", lambda copy, flags, name, wait: (not seen.append((name, wait)), "line"))
    assert faults._kills(tmp_path, [], {"02_b": 50, "01_a": 10}, 4) == 4
    assert [name for name, _ in seen] == ["01_a", "02_b", "02_b", "02_b"]
    assert all(0.2 * n <= wait <= 0.6 * n for n, (_, wait) in zip((10, 50, 50, 50), seen, strict=True))
    assert capsys.readouterr().out.count("killed ") == 4
