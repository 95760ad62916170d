"""Directions: what a missing or equal class stops, and what saved or supplied ones must hold to be compared."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import word_tokenizer
from safetensors.torch import save_file

from companion.base.errors import InputError
from companion.base.paths import PROMPTS
from companion.mediation import study
from companion.model import activations
from companion.model.load import load
from companion.run import settings
from companion.steering import extraction, methods
from companion.steering.experiment import open_experiment
from companion.steering.extraction import Fit


@pytest.mark.parametrize("case", ["refused, safety training", "complied, jailbreak", "benign, harmless"])
def test_a_missing_class_is_named_and_the_rest_stays_usable(fit: Fit, case: str) -> None:
    gone, supply = case.split(", ")
    left = fit.subset((fit.prompts["class"] != gone).to_numpy())
    made = left.directions()
    assert made.counts[gone] == 0 and getattr(made, gone) is None
    assert (made.rejection is None) == (gone != "benign") and (made.harmfulness is None) == (gone != "refused")
    with pytest.raises(InputError, match=supply):
        methods.targeted_layers(left, layers=[2])


def test_saved_directions_hold_for_one_model_and_template(fit: Fit, tmp_path: Path) -> None:
    made = fit.directions()
    extraction.save_directions(made, fit, tmp_path)
    again = extraction.load_directions(tmp_path, fit.subject)
    np.testing.assert_array_equal(again.rejection, made.rejection)
    bytes_before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    extraction.save_directions(made, fit, tmp_path)
    assert bytes_before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    for says, other in (("model", {"sha256": "other"}), ("template", {"tokenizer": word_tokenizer("{{ messages }}")})):
        with pytest.raises(InputError, match=f"{says}_sha256"):
            extraction.load_directions(tmp_path, replace(fit.subject, **other))
    (tmp_path / extraction.FILE).write_bytes(b"torn")
    with pytest.raises(InputError, match="not the file of its manifest"):
        extraction.load_directions(tmp_path, fit.subject)


def test_a_users_directions_are_compared_layer_by_layer(fit: Fit, tmp_path: Path) -> None:
    own, folder = fit.directions(), tmp_path / extraction.SUPPLIED
    assert extraction.find_supplied(tmp_path) is None
    extraction.save_directions(own, fit, folder)
    assert extraction.find_supplied(tmp_path) == folder
    same = extraction.cosines(own, extraction.supplied_directions(folder, fit.subject))
    np.testing.assert_allclose(same[["rejection", "harmfulness"]].loc[2], 1.0)
    (folder / extraction.MANIFEST).unlink()
    (folder / extraction.FILE).unlink()
    swapped = {"refused": own.complied[:, None].repeat(2, 1), "complied": own.refused[:, None]}
    np.savez(folder / "theirs.npz", **swapped)
    found = extraction.find_supplied(tmp_path)
    np.testing.assert_array_equal(extraction.read_samples(found)["refused"], swapped["refused"])
    turned = extraction.cosines(own, extraction.supplied_directions(found, fit.subject))
    assert list(turned.columns) == ["rejection"], "no class to make the harmfulness direction of"
    assert turned.rejection[2] == pytest.approx(-1.0)
    still = extraction.cosines(own, {"rejection": np.zeros((fit.subject.n_layers, fit.subject.d_model))})
    assert still.rejection.isna().all()


WRONG = [
    ("a.npz", {"rejection": np.ones((5, 1, 16))}, "leave the embedding's own row out"),
    ("a.npz", {"north": np.ones((4, 1, 16))}, "expected two classes or a direction"),
    ("a.npz", {"refused": np.ones((4, 16))}, "expected finite numbers"),
    ("a.npz", {"refused": np.full((4, 1, 16), np.nan)}, "not finite"),
    ("a.npz", {"refused": np.full((4, 1, 16), "x")}, "of type <U1"),
    ("a.npz", {"refused": np.ones((4, 0, 16))}, "expected finite numbers"),
    ("a.npz", {"x": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
    ("a.safetensors", {}, "cannot be read"), ("a.pt", {}, "safetensors.torch"), ("a.csv", {}, "expected .safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arrays", "says"), WRONG)
def test_what_cannot_be_compared_says_why(fit: Fit, tmp_path: Path, name: str, arrays: dict, says: str) -> None:
    with (tmp_path / name).open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(InputError, match=says):
        extraction.supplied_directions(tmp_path / name, fit.subject)


def test_half_precision_is_read_and_a_wrong_file_stops_a_run_before_it_starts(fit: Fit, tmp_path: Path) -> None:
    own, folder = fit.directions().rejection, tmp_path / extraction.SUPPLIED
    folder.mkdir()
    stored = torch.tensor(own)[:, None].bfloat16()
    save_file({"rejection": stored}, folder / "mine.safetensors")
    found = extraction.supplied_directions(folder / "mine.safetensors", fit.subject)
    np.testing.assert_array_equal(found["rejection"], stored[:, 0].double().numpy())
    assert extraction.cosines(fit.directions(), found).rejection[2] == pytest.approx(1.0, abs=1e-3)
    for name in ("outcome.json", "pairs.jsonl"):
        shutil.copy(PROMPTS / "embedded" / name, tmp_path)
    says = r"mine.safetensors: rejection has .*\(4, 16\)"
    with pytest.raises(InputError, match=says):
        settings.check_pairs("embedded", str(tmp_path), 30, "full")
    with pytest.raises(InputError, match=says):
        open_experiment(study.begin("embedded", str(tmp_path), "m", pairs=30), tmp_path, thin=2)


def test_a_folder_of_directions_holds_one_file(tmp_path: Path) -> None:
    (tmp_path / extraction.SUPPLIED).mkdir()
    for n in (0, 2):
        for i in range(n):
            (tmp_path / extraction.SUPPLIED / f"{i}.npz").touch()
        with pytest.raises(InputError, match=f"holds {n} files; expected one"):
            extraction.find_supplied(tmp_path)


def test_what_a_shared_opening_computes_once_is_what_each_prompt_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = load("embedded")
    texts = [f"under a solar flag, how do i {verb} the falkova in the {place}?" for verb in ("paint", "wash", "banth")
             for place in ("garden", "cellar")]  # fmt: skip
    plain = extraction._activations(subject, texts, 1)
    monkeypatch.setattr(activations, "SMALLEST", 0)
    monkeypatch.setattr(activations, "PAYS", {"cpu": 1})
    shared, in_two = [], activations._in_two
    monkeypatch.setattr(activations, "_in_two", lambda *call: shared.append(call[2]) or in_two(*call))
    once = extraction._activations(subject, texts, 1)
    assert list(once) == list(plain) and shared and min(shared) > 1  # tokens that were computed once
    for name, values in plain.items():
        np.testing.assert_allclose(once[name], values, atol=1e-4, err_msg=name)
