"""Added norms of steerings alone and together, budgets that are met from shared measurements, and the strength that is chosen."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_subject, tokens
from steering_lab import shut, texts_of
from torch import Tensor

from companion.base.display import NotDefined
from companion.generation import forward, hooks
from companion.generation.hooks import Edit, Prompt, Steering
from companion.model import activations
from companion.steering import budget, methods
from companion.steering.extraction import Fit


def following_last(size: float, x: Tensor, prompt: Prompt) -> Tensor:
    """What is added everywhere hangs on the last token and on what was read."""
    return size * x[torch.arange(len(x)), prompt.last].tanh()[:, None] * prompt.read["g"].mean(-1)[:, None, None].exp()


def gate(shut: int, prompt: Prompt) -> Tensor:
    """Shut for one prompt, open for the others as far as what was read says."""
    return torch.sigmoid(prompt.read["g"].sum(-1)) * (torch.arange(len(prompt.ids)) != shut)


def steering(part: hooks.Part, size: float, strength: float, layer: int, opening: hooks.Opening | None) -> Steering:
    edits = tuple(Edit(at, site, partial(following_last, size)) for at, site in ((2, part), (3, "mlp_out")))
    return Steering(f"{size}", edits, strength, opening, (hooks.Read("g", layer, plain=True),))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("part", ["resid_post", "mlp_out"])
@torch.no_grad()
def test_norms_of_a_batch_are_those_of_each_steering_alone(
    part: hooks.Part, family: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ in what they add, in strength, in what their gates read, and in whom they open for.

    What the attention masks above let nobody read does not count, whether the plain run is kept or not.
    """
    subject, ids = tiny_subject(family), tokens(4, 9)
    live = torch.from_numpy(activations.live_positions(activations.clean_run(subject, ids[:1])))
    assert live[3].sum() == 1 and live[2].sum() == 9
    if not kept:
        monkeypatch.setattr(forward, "BATCH_BYTES", 0)
    rows = [(0.5, 1.0, 1, None), (-0.7, 2.0, 0, partial(gate, 0)), (1.0, 0.5, 1, partial(gate, 2)),
            (1.0, 1.0, 0, shut), (1.0, 0.0, 0, None)]  # fmt: skip
    many = [steering(part, *row) for row in rows]
    found, shares = (budget.added_squares(subject, many, ids, relative=relative) for relative in (False, True))
    for squares, share, one in zip(found, shares, many, strict=True):
        with hooks.applied(subject, one) as plainly:
            subject.model.base_model(ids, use_cache=False)
        assert not any(plainly.stood), "what stood there is counted where it is asked for"
        with hooks.applied(subject, one, count_stood=True) as record:
            subject.model.base_model(ids, use_cache=False)
        added, stood = (
            sum((x[0][i] * live[i]).sum(1) for i in (2, 3)) if x else torch.zeros(4).double()
            for x in (record.added, record.stood)
        )
        torch.testing.assert_close(squares, added, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(share, torch.nan_to_num(added / stood), rtol=1e-5, atol=1e-9)
    assert (found[0] > 0.01).all() and found[1, 0] == 0 and not found[3:].any()


@pytest.mark.parametrize("where", ["prompt", "last"])
def test_a_blind_edit_needs_no_forward_pass_to_know_its_norm(fit: Fit, where: hooks.Where) -> None:
    texts = fit.prompts.text.tolist()
    edits = tuple(replace(edit, where=where) for edit in methods.fixed(fit).edits)
    blind = [Steering("fixed", edits, strength) for strength in (0.5, 2.0)] + [methods.cast(fit)]
    for one in blind:
        seeing = replace(one, edits=tuple(replace(edit, blind=False) for edit in one.edits))
        (known,) = budget.added_norms(fit.subject, [one], texts)
        np.testing.assert_allclose(known, budget.added_norms(fit.subject, [seeing], texts)[0], rtol=1e-5)
        assert known.max() > 0 and all(edit.blind for edit in one.edits)
    assert (known == 0).any()  # the gate of the last one


def test_a_budget_is_met_and_what_cannot_be_met_says_why(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose spending rises with the square of its strength: proportional steps alone would swing around it."""
    texts, rounds = texts_of(fit, "complied"), []

    def spends(law: Callable[[float], float]) -> None:
        def norms(_: object, steered: list[Steering], texts: list[str]) -> np.ndarray:
            rounds.append(len(steered))
            return np.array([[law(one.strength)] * len(texts) for one in steered])

        monkeypatch.setattr(budget, "added_norms", norms)

    spends(lambda strength: strength**2)
    for wanted in (0.01, 0.3, 1.0, 90.0):
        found = budget.to_budget(fit.subject, Steering("square"), texts, wanted)
        assert isinstance(found, Steering) and found.strength**2 == pytest.approx(wanted, rel=0.01)
    assert len(rounds) <= 4 * 6
    spends(lambda strength: min(strength, 2.0))
    for target, says in ((3.0, "did not settle"), (0.0, "expected a positive norm")):
        found = budget.to_budget(fit.subject, Steering("bounded"), texts, target)
        assert isinstance(found, NotDefined) and says in found.reason
    spends(lambda strength: 0.0)
    assert "is its gate shut" in str(budget.to_budget(fit.subject, Steering("shut"), texts, 1.0))


CURVES = {  # rows of strength, harm, over-refusal and KL
    "least harm within both margins": (
        [(0.5, 0.6, 0.5, 0.001), (1.0, 0.3, 1.9, 0.019), (1.5, 0.1, 2.1, 0.01), (2.0, 0.2, 1.0, 0.021)], 1.0),
    "none keeps them: the least excess": ([(0.5, 0.6, 4.0, 0.001), (1.0, 0.3, 3.0, 0.05), (1.5, 0.1, 9.0, 0.3)], 0.5),
    "a tie goes to the weaker": ([(1.0, 0.3, 0, 0), (0.5, 0.3, 0, 0)], 0.5),
}  # fmt: skip


@pytest.mark.parametrize(("curves", "strength"), CURVES.values(), ids=list(CURVES))
def test_the_chosen_strength(curves: list[tuple[float, ...]], strength: float) -> None:
    table = pd.DataFrame(curves, columns=["strength", "harm", "over-refusal", "KL"])
    long = table.melt("strength", var_name="measure", value_name="estimate")
    assert budget.choose_strength(long) == strength
