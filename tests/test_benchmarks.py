"""The benchmarks at a tiny shape, and the cost model against what was measured."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import standin
import torch

from benchmarks import bound, cost_model, faults, gpu, gpu_parts, peers, scaling, sweeps
from benchmarks.shapes import LLAMA_8B, QUOTED, SITES, SMOKE, Job, Workload, machine, workloads
from companion.base import paths
from companion.base.errors import InputError
from companion.base.paths import ROOT

# ---- benchmarks ----


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    return tmp_path / "results" / "benchmarks"


def test_installed_peers_agree_and_absent_ones_are_skipped(results, capsys):
    peers.main(["--shape", "smoke", "--seconds", "0.01"])
    peers.main(["--shape", "smoke", "--seconds", "0.01", "--only", "heads"])  # these take the place of the first
    table, said = pd.read_csv(results / "peers_smoke.csv"), capsys.readouterr().out
    absent = {name for name in peers.TOOLS if f"{name}: not installed, skipped" in said}
    assert {*peers.TOOLS} - {*table.tool} == absent and table.off.max() < 1e-3 and table.workload.nunique() == 12
    assert {*table.state.dropna()} == {"EXACT"} and not table.duplicated(["workload", "tool", "setting"]).any()
    assert (results.parent.parent / "figures" / "benchmarks" / "peers_smoke.png").is_file()


def test_what_was_timed_is_what_was_checked(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, *how = peers.TOOLS["plain hooks"]
    made = {"wrong": lambda setting: lambda jobs: make(setting)(jobs) + 1, "raising": Mock(side_effect=KeyError)}
    monkeypatch.setattr(peers, "TOOLS", peers.TOOLS | {name: (one, *how) for name, one in made.items()})
    peers.main(["--shape", "smoke", "--seconds", "0.01", "--only", "layers, last"])
    rows = pd.read_csv(results / "peers_smoke.csv").set_index("tool")
    assert set(rows.state["wrong"]) == {"SILENTLY_WRONG"} and set(rows.state["raising"]) == {"REFUSED"}
    assert rows.times_ours[["wrong", "raising"]].isna().all()


def test_scaling(results: Path) -> None:
    scaling.main(["--shape", "smoke"])
    table = pd.read_csv(results / "scaling_smoke.csv")
    assert table.factor.nunique() == 5 and (table.bound > 0).all()
    assert (table.groupby("factor").bound.apply(list).apply(lambda b: b == sorted(b))).all()


def test_whole_sweeps_are_timed_where_every_token_may_change(results: Path) -> None:
    sweeps.main(["--shape", "smoke"])
    table = pd.read_csv(results / "sweeps_smoke.csv")
    assert len(table) == 8 and (table.seconds > 0).all() and (table.operations > 0).all()
    assert (table.groupby(["sweep", "treatment"]).operations.apply(list).apply(lambda n: n == sorted(n))).all()
    for pair in sweeps.study(SMOKE, "T1").pairs:  # else fewer cells would be computed than the formula counts
        assert (pair.control != pair.treated).tolist() == [True] + [False] * (SMOKE.n_pos - 1)


def test_the_gpu_study_resumes(results, monkeypatch, capsys):
    asked = ["--device", "cpu", "--shape", "smoke", "--batch", "1"]
    assert gpu.main([*asked, "--minutes", "0"]) == 3
    first = capsys.readouterr().out
    assert "go on with: python -m benchmarks.gpu --device cpu --shape smoke --batch 1 --minutes 0\n" in first
    assert gpu.main(asked) == 0
    second = capsys.readouterr().out
    assert "clean-runs of the pairs from 0 on" in first and "clean-runs of the pairs from 0 on" not in second
    assert "recheck of the pairs from 1 on" in second and "nobody counts the peak on the processor" in second
    table = pd.read_csv(results / "gpu.csv").set_index("part")
    assert (table.pairs == 2).all() and table.interventions.recheck == 288
    exact = table.drop(["clean-runs", "screen"])
    assert (exact.off_by < exact.changed_by / 100).all()
    (folder,) = (results / "gpu").iterdir()
    monkeypatch.setattr(gpu, "machine", lambda where: {**machine(where), "torch": "another"})
    assert gpu.main([*asked, "--parts", "heads"]) == 0  # what another version measured is no part of it
    assert pd.read_csv(results / "gpu.csv").query("part == 'heads'").torch.isin(["another", torch.__version__]).all()
    assert len(list((results / "gpu").iterdir())) == 2 and len(list(folder.iterdir())) == 14
    with pytest.raises(InputError, match="needs the part screen before it"):
        gpu.main([*asked, "--parts", "recheck"])
    with pytest.raises(InputError, match="unknown part tails; there are clean-runs, "):
        gpu.main([*asked, "--parts", "heads,tails"])


def test_the_gpu_study_sets_the_peak_beside_its_plan(results, monkeypatch, capsys):
    asked = ["--device", "standin", "--shape", "smoke", "--parts", "heads,screen"]
    with standin.active(memory=2**34) as where:
        assert gpu.main(asked) == 0 and bound.product_rate(SMOKE, where, seconds=0.01) > 0
    table = pd.read_csv(results / "gpu.csv").set_index("part")
    assert (table.gpu == "stand-in").all() and (table.peak_mib > 0).all() and (table.plan_mib > 0).all()
    above = table.index[table.peak_mib > table.plan_mib]
    said = capsys.readouterr().out.split("memory: ")[1]
    assert [part for part in table.index if f"{part} took" in said] == list(above)
    with standin.active(memory=1000), pytest.raises(InputError, match=r"can give .* but this needs .* for the weights"):
        gpu.main([*asked, "--batch", "1"])
    monkeypatch.setattr(gpu.device, "free_memory", lambda where: 2**34)  # another process takes it after the question
    less = standin.active(memory=standin.MEMORY.held + 300_000)
    with less, pytest.raises(InputError, match="ran out of memory beyond the plan"):
        gpu.main([*asked[:-1], "last-layer-neurons", "--batch", "1"])


def test_the_gpu_study_times_nothing_that_is_wrong(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_parts.replay.interchange
    monkeypatch.setattr(gpu_parts.replay, "interchange", lambda *runs, **read: right(*runs, **read) * 1.01)
    with pytest.raises(InputError, match=r"heads on cpu: interventions are off by .* nothing was timed"):
        gpu.main(["--device", "cpu", "--shape", "smoke", "--parts", "heads"])
    assert not list(results.rglob("*.json"))


def test_the_second_card_is_measured_and_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    second, card = torch.device("cuda", 1), Mock()
    card.get_device_properties.return_value = SimpleNamespace(name="second", total_memory=2**30, major=9, minor=0)
    card.max_memory_allocated.return_value = 7
    for name in ("synchronize", "reset_peak_memory_stats", "get_device_properties", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    assert gpu_parts.measured(second, lambda: "result")[1]["peak"] == 7 and machine(second)["gpu"] == "second"
    assert len(card.mock_calls) == 6 and all(asked.args == (second,) for asked in card.mock_calls)


def test_the_bound_counts_what_an_exact_answer_needs() -> None:
    random, minimal = (bound.minimal_operations(QUOTED, one) for one in workloads(QUOTED) if "every token" in one.name)
    assert 3 < random / minimal < 4.5
    # One neuron of layer 10 of 12, last token: one layer of 3.16 million weights and the unembedding, for 16 pairs.
    one = Workload("one", (Job("neuron", 10, 47, 5),))
    assert bound.minimal_operations(QUOTED, one) == 2 * 16 * (4 * 512**2 + 3 * 512 * 1376 + 512 * 32_000)
    assert bound.product_rate(SMOKE, seconds=0.01) > 1e8


KILLS = {
    "print('[2/2] 02_b ...', flush=True); time.sleep(60)": True,
    "print('[2/2] 02_b ... 1 s', flush=True); time.sleep(60)": False,  # it has finished
    "print('[2/2] 02_b ... ', end='', flush=True)": False,  # the process has ended
    "print('[2/2] 02_b fresh, skipped', flush=True)": False,
}


@pytest.mark.parametrize("code", KILLS)
def test_a_kill_that_disturbs_nothing_is_counted_as_such(tmp_path: Path, monkeypatch, code: str) -> None:
    monkeypatch.setattr(faults, "_command", lambda flags, name: [sys.executable, "-c", f"import time; {code}"])
    found, line = faults._kill(tmp_path, [], "02_b", 0.3)
    assert found == KILLS[code] and line.startswith("too late: ") != found


# ---- cost model ----

FACTOR = 1.6  # how far a measured point may lie from the formula
JOBS = tuple(Job(site, layer, QUOTED.n_pos - 1) for layer in range(QUOTED.n_layers) for site in SITES)
LAST_TOKEN = Workload("x", JOBS)


def predicted(row: pd.Series, rate: float) -> float:
    """Seconds by the formula; the benchmark scores two numbers a pair, one of them over the whole vocabulary."""
    sizes = {"pairs": "n_pairs", "layers": "n_layers", "tokens in the prompt": "n_pos"}
    shape = replace(QUOTED, **{sizes[row.factor]: int(row["size"])})
    operations = shape.n_pairs * cost_model.last_token(shape, read_rows=shape.vocabulary)
    return cost_model.OVERHEAD * operations / rate


@pytest.mark.parametrize("factor", ["pairs", "layers", "tokens in the prompt"])
def test_the_formula_holds_at_the_measured_points(factor: str) -> None:
    table = pd.read_csv(ROOT / "results" / "benchmarks" / "scaling.csv")
    assert table.times_bound.min() < cost_model.OVERHEAD < table.times_bound.max()
    at_quoted = table[(table.factor == "pairs") & (table["size"] == QUOTED.n_pairs)].iloc[0]
    rate = bound.minimal_operations(QUOTED, LAST_TOKEN) / at_quoted.bound  # of that machine's products
    for _, row in table[table.factor == factor].iterrows():
        assert 1 / FACTOR < row.seconds / predicted(row, rate) < FACTOR, row


def test_the_formula_holds_for_whole_sweeps_as_a_run_makes_them() -> None:
    table = pd.read_csv(ROOT / "results" / "benchmarks" / "sweeps.csv")
    design = cost_model.sweeps(QUOTED, cost_model.Design())
    assert set(table.sweep) == set(design) - {"untrained twin"}  # which is the first of them once more
    for row in table.itertuples():
        shape = replace(QUOTED, n_layers=row.layers, n_pairs=row.pairs)
        assert row.operations == pytest.approx(sweeps.counted(row.sweep, row.treatment, shape), rel=1e-4)
        assert 1 / FACTOR < row.seconds * row.rate / (cost_model.OVERHEAD * row.operations) < FACTOR, row


def test_the_page_has_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert not [line for line in cost_model.table() if line not in page]


def test_the_count_is_that_of_the_bound_up_to_the_top_layer() -> None:
    exact = bound.minimal_operations(QUOTED, LAST_TOKEN) / QUOTED.n_pairs
    assert cost_model.last_token(QUOTED, read_rows=QUOTED.vocabulary) == pytest.approx(exact, rel=0.02)


def test_sizes_are_the_known_ones_and_twice_the_processors_take_half_the_time() -> None:
    assert cost_model.parameters(LLAMA_8B) == pytest.approx(8.03e9, rel=0.01)
    assert cost_model.parameters(cost_model.LLAMA_70B) == pytest.approx(70.6e9, rel=0.01)
    one, two = (cost_model.hours(LLAMA_8B, cost_model.Design(), cost_model.Machine("", n, 1e13)) for n in (1, 2))
    assert one == pytest.approx(2 * two)
