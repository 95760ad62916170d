"""Studies and their sweeps: what is kept, precision, and shards that join to the bits of one go."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from models import random_pairs, tiny_subject
from oracles import passed, tiny_study

from companion.base import paths
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.thresholds import COMPONENTS
from companion.generation import outcomes as read_outcomes
from companion.mediation import study, sweeps
from companion.mediation.estimands import prompt_tokens
from companion.mediation.study import Study
from companion.model import activations, memory
from companion.model.load import load
from companion.prompts import positions, tokens
from companion.prompts.pairs import load_set
from companion.run import settings

# ---- sweeps ----


@pytest.fixture(scope="module")
def small() -> Study:
    """Twelve pairs of each of three treatments."""
    whole = study.begin("embedded", "embedded", "sharded", profile="smoke")
    chosen = [pair for name in ("T1", "T2", "T2b") for pair in whole.of(name)[:12]]
    return replace(whole, pairs=tuple(chosen))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def same(one: sweeps.Tables, other: sweeps.Tables) -> bool:
    return set(one) == set(other) and all(one[name].equals(other[name]) for name in one)


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_shards_join_to_the_same_bits(small: Study, results: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sweeps.run_sweep(small, name)
    assert not list(results.rglob("*.zip"))  # a run without shards keeps no parts
    n = len(sweeps.sweep_batches(small, name))
    assert [sweeps.run_shard(small, name, shard, 2)[0] for shard in (1, 0)] == [n // 2, n - n // 2]
    next(results.rglob("*.zip")).unlink()  # what a shard did not finish is measured when joined, and kept
    assert same(sweeps.run_sweep(small, name), alone) and len(list(results.rglob("*.zip"))) == n
    monkeypatch.setattr(activations, "clean_run", None)  # nothing is measured again
    assert same(sweeps.run_sweep(small, name), alone)
    assert sweeps.run_shard(small, name, 0, 1) == (0, n)  # another number of shards finds the same parts


def test_a_part_is_made_again_unless_it_is_whole_and_its_own(small: Study, results: Path) -> None:
    sweeps.run_shard(small, "layers", 0, 1)
    place, n = sweeps.part_folder(small, "layers"), len(sweeps.sweep_batches(small, "layers"))
    part, other = (place / f"{i:05d}.zip" for i in (1, 0))
    good, foreign = part.read_bytes(), sweeps.write_part(sweeps.read_part(place, 1), results, 1).read_bytes()
    at = len(good) // 2
    flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for damage in (good[:100], b"", b"no part", other.read_bytes(), foreign, flipped):
        part.write_bytes(damage)
        assert sweeps.read_part(place, 1) is None and sweeps.run_shard(small, "layers", 0, 1) == (1, n - 1)
        assert part.read_bytes() == good
    part.unlink()
    assert sweeps.read_part(place, 1) is None
    sweeps.write_part({"effects": pd.DataFrame({"a": [1]})}, results, 0, ["out of memory once"])
    assert sweeps.read_part(results, 0) is not None  # halved chunks are known to the run that joins
    assert sweeps.memory_plan(small)["events"][-1:] == ["out of memory once"]


def test_the_key_changes_with_all_that_numbers_rest_on(small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = replace(small.pairs[0], control=small.pairs[0].control[::-1])
    others = [
        small, replace(small, pairs=small.pairs[1:]), replace(small, pairs=(moved, *small.pairs[1:])),
        replace(small, subject=replace(small.subject, sha256="0" * 64)),
        replace(small, openers={name: replace(one, comply=(1,)) for name, one in small.openers.items()}),
    ]  # fmt: skip
    keys = [sweeps.part_folder(one, "layers") for one in others] + [sweeps.part_folder(small, "modules")]
    monkeypatch.setattr(sweeps.files, "hash_folder", lambda *_: "another version")
    keys.append(sweeps.part_folder(small, "layers"))
    assert len(set(keys)) == len(keys)
    assert sweeps.part_folder(replace(small, slug="elsewhere"), "layers").name == keys[-1].name


def test_modules_are_measured_where_the_contrast_needs_them_and_everywhere_without_it() -> None:
    this = tiny_study(treatments=("T1", "T2", "T2b"))
    only = replace(this, pairs=tuple(this.of("T1")))
    for one, wanted in ((this, {"T2", "T2b"}), (only, {"T1"})):
        assert {p.pair.treatment for group in sweeps.sweep_batches(one, "modules") for p in group} == wanted


# ---- study ----


@pytest.fixture
def this() -> Study:
    return Study("own", tiny_subject("llama"), tuple(random_pairs(8, 9, 61)), {}, {})


@pytest.mark.parametrize("is_sensitive", [True, False])
def test_a_readers_own_pair_hides_what_a_sensitive_set_hides(is_sensitive: bool) -> None:
    subject = load("embedded")
    first = [replace(pair, sensitive=is_sensitive) for pair in load_set("embedded").pairs[:12]]
    this = Study("x", subject, tuple(tokens.tokenize(first, subject.tokenizer)[0]), {}, {})
    pair = this.pairs[0].pair
    made = study.own_pair(this, pair.control, pair.treated, pair.treatment)
    shown = positions.token_labels(made, "treated", subject.tokenizer)
    words = {word for word in pair.treated.replace("?", "").replace(",", "").split() if len(word) > 2}
    assert bool(words & {label.strip("·") for label in shown}) is not is_sensitive
    longer = study.own_pair(this, pair.control, pair.control.replace("?", " again?"), pair.treatment)
    assert isinstance(longer, NotDefined) and f"Control has {len(this.pairs[0].control)} tokens" in str(longer)
    assert ("not shared: none; " in str(longer)) is not is_sensitive
    assert not [word for word in words if len(word) > 4 and word in str(longer)]


def test_a_shipped_model_is_compared_with_the_others_and_twins(this: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    others = study.other_shipped("embedded")
    assert len(others) > 1 and "window-0" not in others and others[-1].startswith("full")
    assert study.other_shipped("embedded", "smoke") == study.other_shipped("elsewhere/model") == ()
    monkeypatch.setattr(study, "load", lambda name, **_: replace(this.subject, name=name))
    monkeypatch.setattr(study, "untrained_twin", lambda subject, seed: f"twin {seed} of {subject.name}")
    monkeypatch.setattr(Study, "subsample", lambda study, n: study)
    found = {label: one.subject for label, one in study.control_studies(this, "embedded", "full")}
    assert list(found) == [name + end for name in ("own", *others) for end in ("", " (untrained)")][1:]
    assert found[others[1]].name == others[1] and found["own (untrained)"] == "twin 0 of tiny llama"
    assert found[f"{others[1]} (untrained)"] == f"twin 2 of {others[1]}"


def test_a_costly_model_takes_few_pairs_and_fewer_where_no_verdict_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    content = load_set("embedded")
    assert study.affordable_pairs(load("embedded"), content) == 0
    plain = study.begin("embedded", "embedded", "own")
    assert len(plain.of("T1")) == 360 and len(plain.thinned(120).of("T1")) == 120 and len(plain.thinned_layers) == 6
    monkeypatch.setattr(study, "BUDGET", 1e9)
    assert study.affordable_pairs(plain.subject, content) == 72
    said = settings.check_pairs("embedded", "embedded", 0, "full")
    costly = study.begin("embedded", "embedded", "own")
    assert said[0].startswith(f"{len(costly.pairs)} of {len(costly.pairs)} pairs usable")
    assert re.match(r"at most 72 pairs a treatment.*\(about \d+ minutes for all notebooks", said[1])
    main = pd.DataFrame([vars(one.pair) for one in costly.of("T1", "T2", "T2b")]).groupby(["treatment", "split"])
    assert plain.judged is plain and {p.pair.split for p in costly.judged.pairs} == {"discover", "test"}
    assert len(costly.judged.pairs) == sum(p.pair.split != "validate" for p in costly.pairs)
    swept = [pair for group in sweeps.sweep_batches(costly, "whole answers") for pair in group]
    assert {pair.pair.split for pair in swept} == {"discover", "test"}
    assert len(costly.of("T1")) == 72 and main.topic.nunique().min() >= 20 and len(costly.of("B1")) == study.ROBUST
    asked = [Counter(p.treatment for p in study.chosen_pairs(content, n, "smoke")) for n in (0, 72)]
    assert [(found["T2"], found["B1"]) for found in asked] == [(24, 24), (6, 3)]
    for n in (-1, 1, 9):
        with pytest.raises(InputError, match=f"--pairs {n}: at least 10 pairs"):
            study.chosen_pairs(content, 72, asked=n)
    assert len(study.begin("embedded", "embedded", "own", pairs=100).of("T1")) == 100
    assert costly.thinned_layers == (2, 5) and replace(costly, is_smoke=True).thinned_layers == (5,)
    assert len(costly.thinned(120).of("T1")) == study.ROBUST
    twin = study.control_study(costly, "embedded", "own (untrained)")
    assert twin.pairs == tuple(costly.thinned(120).of("T1", "T2", "T2b"))


def test_a_run_s_length_is_its_operations_above_each_intervention_at_the_speed_of_one_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = load("embedded")
    size = sum(p.numel() for p in subject.layers[0].block.parameters())
    assert memory.operations(subject) == 2 * (3 + 4) * 2 * size * (0 + 1 + 2 + 3 + 4 + 5)
    monkeypatch.setattr(memory, "timeit", SimpleNamespace(repeat=lambda *_, **__: [4.0, 3.0]))  # a product takes 3 s
    site = 3.0 / (2 * memory.ON_A_PROCESSOR * subject.d_model * subject.d_mlp) * memory.operations(subject) / (3 + 4)
    assert memory.minutes(subject, 10) == pytest.approx(
        (memory.RUN_COST + 4) * 10 * site / 60
    )  # heads: their sweep alone


def test_divisors_are_patch_lengths_and_parameters(this: Study) -> None:
    found, mlp = study.normalisations(this), this.subject.model.model.layers[2].mlp
    control, treated = (passed(this.subject.model, ids, mlp)[1] for ids in prompt_tokens(this.subject, this.pairs))
    length = float((treated - control)[:, -1].norm(dim=-1).mean())
    assert found["per patch norm"]["mlp_out", 2] == pytest.approx(length, rel=1e-4)
    assert found["per parameter"]["mlp_out", 2] == sum(p.numel() for p in mlp.parameters())
    cells = pd.MultiIndex.from_product([COMPONENTS, range(4)])
    assert all(set(one.index) == set(cells) for one in found.values())


def test_half_precision_has_a_noise_floor_and_float32_has_none() -> None:
    whole, half = (study.begin("embedded", "embedded", "x", dtype=dtype, pairs=10) for dtype in ("float32", "bfloat16"))
    assert study.describe_precision(whole) == "effects are computed in float32"
    assert study.tolerance(whole) == 1e-4 < study.tolerance(half)
    shown = study.describe_precision(half)
    assert shown.startswith("SCREENING in bfloat16") and "neuron" in shown and "mlp_out" in shown
    for one in (half, tiny_study(dtype=torch.bfloat16, n=3)):
        assert 1e-3 < study.noise_floor(one, "mlp_out")[0] < 1
        _, changed, lost = study.noise_floor(one, "neuron")
        assert 0 < changed + lost < 1 and changed < 0.5 and one.subject.dtype == torch.bfloat16
    assert study.noise_floor(tiny_study(dtype=torch.float32, n=3), "neuron") == (0, 0, 0)


def test_a_set_of_refusals_against_everything_else_is_measured(tmp_path: Path) -> None:
    shipped = (paths.PROMPTS / "embedded" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [row | {"twin": None} for row in map(json.loads, shipped) if row["treatment"] in ("T1", "T2")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, kept)))
    each = {"T2": {"comply": "rest", "refuse": ["sorry"]}, "T1": {"comply": ["sure"], "refuse": ["sorry"]}}
    (tmp_path / "outcome.json").write_text(json.dumps(each))
    made = study.begin("embedded", str(tmp_path), "x", pairs=10)
    subject, (refuse,) = made.subject, made.openers["T2"].refuse
    assert len(made.openers["T2"].comply) == len(subject.unembedding[0]) - 1 and len(made.openers["T1"].comply) == 1
    clean = sweeps.clean_outcomes(made)
    harmful = clean[clean.treatment == "T2"].set_index("pair_id")
    np.testing.assert_allclose(harmful.joint, 1, rtol=0, atol=1e-9)
    assert (clean.joint[clean.treatment == "T1"] < 0.995).all()
    for pair in made.of("T2"):
        with torch.no_grad():
            p = float(subject.model(torch.tensor(pair.treated)[None]).logits[0, -1].double().softmax(-1)[refuse])
        read = read_outcomes.log_odds(subject, [pair.pair.treated], made.openers["T2"])
        for found in (harmful.y11[pair.pair.id], read.log_odds[0]):
            assert found == pytest.approx(np.log((1 - p) / p), abs=1e-4)
        assert read.p_refuse[0] == pytest.approx(p, abs=1e-5)
