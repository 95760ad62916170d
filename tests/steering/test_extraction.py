"""Directions: what a missing or equal class stops, and what saved ones say of themselves."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from companion.base.errors import InputError
from companion.base.files import read_json
from companion.model import activations
from companion.model.load import load
from companion.steering import extraction, methods
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


def test_saved_directions_come_with_what_they_hold_for(fit: Fit, tmp_path: Path) -> None:
    made = fit.directions()
    extraction.save_directions(made, fit, tmp_path)
    means = load_file(tmp_path / extraction.FILE)
    np.testing.assert_array_equal(means["refused"] - means["complied"], made.rejection)
    manifest = read_json(tmp_path / extraction.MANIFEST)
    assert (manifest["model_sha256"], manifest["n"]) == (fit.subject.sha256, made.counts)
    bytes_before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    extraction.save_directions(made, fit, tmp_path)
    assert bytes_before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]


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
