"""The benchmarks at a tiny shape: they run, agree with each other, and resume."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import bound, gpu, peers, scaling
from benchmarks.shapes import QUOTED, SMOKE, Job, Workload, workloads
from helpers import paths
from helpers.errors import InputError


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
