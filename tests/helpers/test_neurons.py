"""Helpers of notebooks 04 and 04b, against plain runs of the shipped model with hooks."""

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base.display import NotDefined
from companion.mediation.estimands import prompt_tokens
from companion.mediation.study import Study
from helpers import model, neurons


@pytest.fixture(scope="module")
def found(study: Study) -> neurons.Neurons:
    return neurons.measure_neurons(study)


def patched(study: Study, prompt: torch.Tensor, values: torch.Tensor, members: list[int]) -> float:
    """Y1 of a prompt with some last-layer neurons at given values, by a hook."""

    def put(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, -1, members] = values[members]
        return x

    with torch.no_grad(), neurons.edit_input(study.subject.layers[-1].down_proj, put):
        last = study.subject.model(prompt).logits[:, -1]
    comply, refuse = (list(getattr(study.openers["T2"], camp)) for camp in ("comply", "refuse"))
    return float((last[:, comply].logsumexp(1) - last[:, refuse].logsumexp(1)).item())


def test_four_cells_and_the_product_are_those_of_runs_with_hooks(study: Study) -> None:
    pair, members, seen = model.example_pair(study), [3, 77, 200], []
    sides = prompt_tokens(study.subject, [pair])
    with neurons.edit_input(study.subject.layers[-1].down_proj, lambda x: seen.append(x[0, -1])), torch.no_grad():
        for ids in sides:
            study.subject.model(ids)
    by_hand = [patched(study, prompt, values, members) for prompt in sides for values in seen]
    assert neurons.four_cells(study, pair, members) == pytest.approx(by_hand, abs=1e-4)
    table = neurons.gate_and_up(study, pair, 9)
    assert isinstance(table, pd.DataFrame)
    assert np.diag(table) == pytest.approx([float(values[9]) for values in seen], abs=1e-5)


def test_the_strongest_are_ranked_on_discover_and_fire_on_prompts_of_test(found: neurons.Neurons) -> None:
    table = neurons.strongest(found, 5)
    assert len(table) == 5 and table.neuron.is_unique
    assert (table.estimate - (table.nie0 + table.nie1) / 2).abs().max() < 1e-9
    fires = neurons.fires_on(found, table.neuron.to_numpy()[:2])
    assert set(fires.kind) == set(neurons.KINDS.values()) and fires.groupby("neuron").size().nunique() == 1


def test_curves_end_at_the_whole_and_what_is_not_defined_stays_so(found: neurons.Neurons) -> None:
    table = neurons.curve_table(neurons.all_curves(found))
    assert isinstance(table, pd.DataFrame)
    ends = table.sort_values("k").groupby("series").estimate.last()
    assert ends.to_numpy() == pytest.approx(1.0, abs=1e-6)
    none = NotDefined("nothing")
    assert neurons.curve_table(none) is neurons.settled(none) is neurons.gate_cells(none) is none
