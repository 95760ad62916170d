"""What a model is compared with."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from families import tiny_subject
from handmade import random_pairs

from companion.base.thresholds import COMPONENTS
from companion.mediation import control_models
from companion.mediation.study import Study


@pytest.fixture
def this() -> Study:
    return Study("own", tiny_subject("llama"), tuple(random_pairs(8, 9, 61)), {}, {}, {})


def test_a_shipped_model_is_compared_with_the_others_and_all_their_twins(
    this: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = control_models.other_shipped("embedded")
    assert len(others) > 1 and "window-0" not in others and others[-1].startswith("full")
    assert control_models.other_shipped("embedded", "smoke") == control_models.other_shipped("elsewhere/model") == ()
    monkeypatch.setattr(control_models, "load", lambda name, **_: replace(this.subject, name=name))
    monkeypatch.setattr(control_models, "untrained_twin", lambda subject, seed: f"twin {seed} of {subject.name}")
    monkeypatch.setattr(Study, "subsample", lambda study, n: study)
    found = {label: one.subject for label, one in control_models.control_studies(this, "embedded", "full")}
    assert list(found) == [name + end for name in ("own", *others) for end in ("", " (untrained)")][1:]
    assert found[others[1]].name == others[1]
    assert found["own (untrained)"] == "twin 0 of tiny llama"
    assert found[f"{others[1]} (untrained)"] == f"twin 2 of {others[1]}"


def test_divisors_are_patch_lengths_and_parameters(this: Study) -> None:
    found = control_models.normalisations(this)
    ids = [torch.tensor([getattr(pair, side).tolist() for pair in this.pairs]) for side in ("control", "treated")]
    seen: list[torch.Tensor] = []
    mlp = this.subject.model.model.layers[2].mlp
    with mlp.register_forward_hook(lambda _, __, output: seen.append(output[:, -1].detach())):
        for tokens in ids:
            this.subject.model(tokens)
    assert found["per patch norm"]["mlp_out", 2] == pytest.approx(
        float((seen[1] - seen[0]).norm(dim=-1).mean()), rel=1e-4
    )
    assert found["per parameter"]["mlp_out", 2] == sum(p.numel() for p in mlp.parameters())
    cells = pd.MultiIndex.from_product([COMPONENTS, range(4)])
    assert all(set(one.index) == set(cells) for one in found.values())
