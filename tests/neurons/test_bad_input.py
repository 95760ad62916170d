"""What cannot be measured is named."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from families import tiny_subject, tokens
from neuron_tools import additive, made_effects, tiny_study

from companion.base.errors import InputError
from companion.model import activations
from companion.neurons import adjacency, closed_form, sparsity
from companion.neurons.sets import joint
from companion.neurons.single import all_neurons, in_split, measure_chosen, neuron_table, ranking, signed


def padded() -> object:
    subject, mask = tiny_subject("llama"), torch.arange(9) < torch.tensor([[9], [8], [7]])
    runs = [activations.clean_run(subject, tokens(seed=seed), mask) for seed in (1, 2)]
    return closed_form.last_layer_neurons(subject, *runs, torch.tensor([5]))


def joined(members: list) -> object:
    subject, measured = additive(np.ones(6))
    return joint(subject, measured.states["T2"], np.array(members))


ONES, ZEROS = made_effects(np.ones((12, 3))), made_effects(np.zeros((12, 40)))
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: measure_chosen(tiny_study(), "T1", all_neurons(tiny_study().subject)), "no pairs of T1: it has T2, T2b"),
    (lambda: signed(in_split(ONES, "test")), "no pair is in the discover split"),
    (lambda: ranking(neuron_table(ONES), "T9", 0), "no rows of T9, layer 0"),
    (lambda: adjacency.windows(np.arange(16)), "a window of half-width 8 needs 17"),
    (lambda: adjacency.moran_test(ZEROS), "no neuron has any effect: there is nothing whose place could matter"),
    (lambda: sparsity.concentration(ZEROS), "nothing can be concentrated"),
    (padded, "is padding in some pair"),
    *((lambda bad=bad: joined(bad), "different neurons of 0 to 5") for bad in ([[0, 0]], [[0, 6]], [[-1, 2]], [1, 2])),
]


@pytest.mark.parametrize(("ask", "sentence"), BAD)
def test_the_sentence(ask: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        ask()
