"""The benchmarks at a tiny shape, and the cost model against what was measured."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import pytest
import standin
import torch

from benchmarks import bound, cost_model, faults, gpu, gpu_parts, peers, profile_run, scaling, sweeps
from benchmarks.shapes import QUOTED, REAL, SITES, SMOKE, Job, Workload, machine, workloads
from companion.base import paths
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.mediation import estimands
from companion.model.activations import shared_prefix

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
    assert table.factor.nunique() == 6 and (table.operations > 0).all()
    assert (table.groupby("factor").operations.apply(list).apply(lambda n: n == sorted(n))).all()


def test_whole_sweeps_are_timed_where_every_token_behind_the_prefix_may_change(results: Path) -> None:
    sweeps.main(["--shape", "smoke"])
    table = pd.read_csv(results / "sweeps_smoke.csv")
    assert len(table) == 7 and (table.seconds > 0).all() and (table.operations > 0).all()
    shape = replace(REAL, n_layers=2)
    made = sweeps.study(sweeps.checked_llama(shape), shape)  # else other cells were computed than are counted
    assert shared_prefix(made.subject, *estimands.prompt_tokens(made.subject, made.of("T1"))) == 25
    assert all((one.control != one.treated).nonzero()[0].tolist() == [25] for one in made.pairs)


def test_a_profile_gives_each_look_to_a_kind_of_work(results: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    cells = {"MODEL = ''": ["parameters"], "import time\nimport torch\ntime.sleep(0.5)\nassert MODEL == 'embedded'": []}
    rows = [{"cell_type": "code", "source": one, "metadata": {"tags": tags}} for one, tags in cells.items()]
    (tmp_path / "01_toy.ipynb").write_text(json.dumps({"cells": rows, "metadata": {}}))
    monkeypatch.setattr(profile_run.runner, "find_notebooks", lambda *asked: {"01": tmp_path / "01_toy.ipynb"})
    profile_run.main(["--model", "embedded", "--profile", "smoke"])
    table = pd.read_csv(results / "profile_embedded-smoke.csv").set_index("kind")
    assert table.seconds["cells by hand"] > 0.4 < table.seconds["loading"] and table.share.sum() == pytest.approx(1)
    assert "steered prompts, answers" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("says", "seconds", "disturbs"),
    [("...\\n", 60, True), ("... 1 s\\n", 60, False), ("... ", 0, False), ("fresh, skipped\\n", 0, False)],
    ids=["at work", "finished", "ended", "skipped"],
)
def test_a_kill_that_disturbs_nothing_is_counted_as_such(tmp_path: Path, monkeypatch, says, seconds, disturbs) -> None:
    code = f"import time; print('[2/2] 02_b {says}', end='', flush=True); time.sleep({seconds})"
    monkeypatch.setattr(faults, "_command", lambda flags, name: [sys.executable, "-c", code])
    found, line = faults._kill(tmp_path, [], "02_b", 0.3)
    assert found == disturbs and line.startswith("too late: ") != found


# ---- cost model ----


def test_the_formula_holds_for_every_measured_row() -> None:
    whole, parts = (pd.read_csv(cost_model.TABLES / f"{name}.csv") for name in ("sweeps", "scaling"))
    mean, factor = cost_model.overhead()
    for row in whole.itertuples():
        shape = replace(sweeps.SHAPES[row.shape], n_pairs=row.pairs)
        assert row.operations == pytest.approx(sweeps.counted(row.sweep, row.kind, shape), rel=1e-4)
    for row, (*point, _, _, operations) in zip(parts.itertuples(), scaling._points(QUOTED), strict=True):
        assert [row.factor, row.size] == point and row.operations == pytest.approx(operations, rel=1e-4)
    for row in [*whole.itertuples(), *parts.itertuples()]:
        assert 0.99 / factor < row.seconds * row.rate / row.operations / mean < 1.01 * factor, row
    assert set(whole.sweep) == set(cost_model.sweeps(QUOTED, cost_model.design(False))) and factor < 3


def test_the_page_has_the_table_of_the_code() -> None:
    assert "\n".join(cost_model.table()) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_count_is_that_of_the_bound_up_to_the_top_layer() -> None:
    last = tuple(Job(site, layer, QUOTED.n_pos - 1) for layer in range(QUOTED.n_layers) for site in SITES)
    exact = bound.minimal_operations(QUOTED, Workload("x", last)) / QUOTED.n_pairs
    assert cost_model.at_each_layer(QUOTED, len(SITES), 1) == pytest.approx(exact, rel=0.02)


def test_sizes_are_the_known_ones_and_jobs_share_all_but_what_is_computed() -> None:
    for model, known in zip(cost_model.MODELS.values(), (134.5e6, 1.236e9, 8.030e9, 70.55e9), strict=True):
        assert cost_model.sizes(*model)[0] == pytest.approx(known, rel=1e-3)
    design, shape = cost_model.design(True), cost_model.MODELS["Llama-3.1-8B"][0]
    costs = cost_model.sweeps(shape, design)
    one, two = (cost_model.hours(shape, design, cost_model.Machine("", n, 1e13)) for n in (1, 2))
    assert two / one == pytest.approx((1 + costs["what is computed"] / sum(costs.values())) / 2)
    assert design.pairs == {"T1": 51, "T2": 102, "B": 126} and design.twin == {"T1": 21, "T2": 42}
