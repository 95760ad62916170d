"""The L2 budget of a steering, and what it costs at each strength, so that methods are compared at one size.

A prompt's added norm is the root of the summed squares of what was added at all steered sites and prompt tokens, as far as it can
act: what is added to the last layer's output counts at the last token alone (`activations.live_positions`). The budget is its
root mean square over prompts, so an adaptive method may spend it on fewer prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import NotDefined
from companion.base.thresholds import MARGINS
from companion.generation import forward, outcomes
from companion.generation.decode import Answers
from companion.generation.hooks import Record, Steering, applied, tail
from companion.model.activations import clean_run, live_positions
from companion.model.architecture import Subject
from companion.steering.experiment import PLAIN, SteeringExperiment, answer, select

TOLERANCE: Final = 0.01  # relative, of a met budget
TRIES: Final = 12
N_CURVE: Final = 300  # harmful prompts, and others, of costs and random directions
N_PRICE: Final = 60  # harmless prompts on which the divergence is measured
Costs: TypeAlias = Mapping[str, tuple[np.ndarray, np.ndarray]]  # values and topics [prompt] of each measure


@dataclass(frozen=True)
class EvaluationPrompts:
    """The prompts of one split that costs are measured on, and the plain model's greedy answers to the harmless ones."""

    experiment: SteeringExperiment
    harmful: pd.DataFrame
    others: pd.DataFrame
    free: pd.DataFrame
    own: Answers

    @property
    def mixed(self) -> list[str]:
        """The texts on which a budget is measured: some harmful and as many other prompts."""
        n = min(len(self.harmful), len(self.others), 60)
        others = self.others.text.iloc[np.linspace(0, len(self.others) - 1, n).astype(int)]
        return [*self.harmful.text.iloc[:n], *others]

    def budgets(self, steered: Sequence[Steering], *, relative: bool = False) -> list[float]:
        """The L2 budget of each steering on `mixed`; `relative` measures norms in lengths of what stood at the steered sites."""
        norms = added_norms(self.experiment.subject, steered, self.mixed, relative=relative)
        return [_root_mean_square(row) for row in norms]

    def first_token_costs(self, steered: Sequence[Steering]) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Values and topics [prompt] of harm (1 - P(refusal) of harmful prompts) and of over-refusal, under each steering.

        Over-refusal is the rise of P(refusal) on the other prompts, in points.
        """
        n, made = len(self.harmful), []
        for found in self.experiment.first_tokens(pd.concat([self.harmful, self.others]), steered):
            refusing = found.p_refuse.to_numpy()
            over = 100 * (refusing[n:] - self.others.p_refuse.to_numpy())
            harm = (1 - refusing[:n], self.harmful.topic.to_numpy())
            made.append({"harm": harm, "over-refusal": (over, self.others.topic.to_numpy())})
        return made

    def mean_costs(self, steered: Sequence[Steering]) -> pd.DataFrame:
        """Means of `first_token_costs` and of KL, nats a token on the model's own answers: a row a steering."""
        prices = outcomes.price_each(self.experiment.subject, self.free.text, self.own, steered)
        rows = [{name: values.mean() for name, (values, _) in one.items()} for one in self.first_token_costs(steered)]
        return pd.DataFrame(rows).assign(KL=[price.kl.mean() for price in prices])


def evaluation_prompts(lab: SteeringExperiment, split: str, n: int = N_CURVE) -> EvaluationPrompts:
    """`n` wrapped harmful prompts (or all), as many borderline and harmless ones, and a few harmless ones for the divergence."""
    harmful = select(lab, split, "harmful", wrapped=True, n=n)
    others = pd.concat([select(lab, split, kind, n=n // 2) for kind in ("borderline", "harmless")])
    free = select(lab, split, "harmless", n=N_PRICE)
    return EvaluationPrompts(lab, harmful, others, free, answer(lab, PLAIN, free, greedy=True))


@torch.no_grad()
def added_norms(
    subject: Subject, steered: Sequence[Steering], texts: Sequence[str], *, relative: bool = False
) -> Float[np.ndarray, "steering prompt"]:
    """The norm of what each of the steerings adds to each prompt where it can act, while prompts are read.

    In units of the residual stream, or `relative` to what stood at the steered sites.
    """
    norms = np.zeros((len(steered), len(texts)))
    for places, ids in forward.buckets(subject, texts, system=outcomes.common_system(steered)):
        groups = forward.fitting(steered, len(ids))
        squares = torch.cat([added_squares(subject, group, ids, relative=relative) for group in groups])
        norms[:, places] = to_host(squares.sqrt())
    return norms


def added_squares(
    subject: Subject, steered: Sequence[Steering], ids: Int[Tensor, "prompt pos"], *, relative: bool = False
) -> Float[Tensor, "steering prompt"]:
    """Squared added norms of one batch of prompts under steerings of the same sites, for `added_norms`."""
    found = torch.zeros(len(steered), len(ids), dtype=torch.float64, device=ids.device)
    run = forward.plain_run(subject, ids)
    live = torch.from_numpy(live_positions(run or clean_run(subject, ids[:1], keep=("cache",)))).to(ids.device)
    if run is None:
        for squares, one in zip(found, steered, strict=True):
            with forward.plain_layers_once(subject, one, ids), applied(subject, one, count_stood=relative) as record:
                subject.model.base_model(ids, use_cache=False)
            squares += _live_squares(record, live, relative) if record.added else 0.0
        return found
    parts = forward.steered_parts(steered, run)
    if parts and not relative and all(edit.blind for edit in steered[0].edits):
        for i, part in parts.items():
            found[i, part.rows] = _blind_squares(steered[i], part, live)
    elif parts:
        steering, whole, places = forward.stacked([steered[i] for i in parts], list(parts.values()))
        with applied(subject, steering, whole.prompt, count_stood=relative) as record:
            forward.forward_from_layer(subject, steering, whole, top=max(edit.layer for edit in steering.edits))
        squares = _live_squares(record, live, relative)
        for (i, part), at in zip(parts.items(), places, strict=True):
            found[i, part.rows] = squares[at]
    return found


def _live_squares(record: Record, live: Bool[Tensor, "layer pos"], relative: bool) -> Float[Tensor, "row"]:
    """The squared norm of what was added where it can act, or its ratio to that of what stood there."""

    def total(found: dict[int, Tensor]) -> Float[Tensor, "row"]:
        return torch.stack([(squares * live[layer]).sum(1) for layer, squares in found.items()]).sum(0)

    added = total(record.added)
    if not relative:
        return added
    stood = total(record.stood)
    return torch.where(stood > 0, added / stood, torch.zeros_like(added))


def _blind_squares(
    steering: Steering, part: forward.BatchRows, live: Bool[Tensor, "layer pos"]
) -> Float[Tensor, "row"]:
    """The squared norm of edits that add the same whatever the activations are: nothing has to be computed for it."""
    prompt, total = part.prompt, torch.zeros(len(part.rows), dtype=torch.float64, device=part.rows.device)
    for edit in steering.edits:
        x = part.of(part.run.resid_post[edit.layer][:, -1:])
        added = steering.strength * prompt.opened[0].to(x)[:, None, None] * edit.delta(x, tail(prompt, 1)).to(x)
        n_tokens = 1 if edit.where == "last" else int(live[edit.layer].sum())
        total += n_tokens * added.double().square().sum((1, 2))
    return total


@torch.no_grad()
def gate_values(subject: Subject, steering: Steering, texts: Sequence[str]) -> Float[np.ndarray, "prompt"]:
    """How far the gate opens for each prompt, of a steering that has edits and a strength."""
    values = np.zeros(len(texts))
    for places, ids in forward.buckets(subject, texts):
        if run := forward.plain_run(subject, ids):
            gates = forward.opened(steering, run).opened
        else:
            with forward.plain_layers_once(subject, steering, ids), applied(subject, steering) as record:
                subject.model.base_model(ids, use_cache=False)
            gates = record.gates
        values[places] = to_host(gates[0])
    return values


def _root_mean_square(norms: Float[np.ndarray, "prompt"]) -> float:
    return float(np.sqrt(np.mean(np.square(norms))))


def to_budget(subject: Subject, steering: Steering, texts: Sequence[str], target: float) -> Steering | NotDefined:
    """The steering with the strength at which this budget on the prompts is met to 1 %; or why it cannot be met.

    It is found by iteration: edits that read what lower edits changed do not scale exactly with the strength.
    """
    if target <= 0:
        return NotDefined(f"the budget is {target}; expected a positive norm (leave the model unsteered otherwise)")
    spent, asked = dict[float, float](), steering.strength or 1.0
    for _ in range(TRIES + 1):
        (norms,) = added_norms(subject, [replace(steering, strength=asked)], texts)
        spent[asked] = _root_mean_square(norms)
        if not np.isfinite(spent[asked]) or spent[asked] == 0:
            return NotDefined(
                f"{steering.name} adds {spent[asked]} to these {len(texts)} prompts at strength {asked:.3g}: no strength "
                "meets a budget; is its gate shut, or has every prompt what it steers towards?"
            )
        if abs(spent[asked] / target - 1) <= TOLERANCE:
            return replace(steering, strength=asked)
        asked = _next_strength(spent, target)
    return NotDefined(
        f"{steering.name}: the strength for a budget of {target:.3g} did not settle; try a smaller budget"
    )


def _next_strength(spent: Mapping[float, float], target: float) -> float:
    """The next strength to try for a budget: between measured ones, or from the nearest in proportion, at most fivefold."""
    at = sorted(spent)
    for low, high in pairwise(at):
        if min(spent[low], spent[high]) < target < max(spent[low], spent[high]):
            x, y = np.log([low, high]), np.log([spent[low], spent[high]])
            return float(np.exp(x[0] + (np.log(target) - y[0]) * (x[1] - x[0]) / (y[1] - y[0])))
    near = min(at, key=lambda one: abs(np.log(spent[one] / target)))
    return near * float(np.clip(target / spent[near], 0.2, 5.0))


def scaled(steered: Steering, factor: float) -> Steering:
    """The same method, so many times as strong."""
    return replace(steered, strength=factor * steered.strength)


def choose_strength(costs: pd.DataFrame) -> float:
    """The strength of least harm among those that keep over-refusal and KL within their margins, by their means on validate.

    `costs` has a row a strength, from weak to strong; ties go to the weaker. Where none keeps them, it is the one that breaks the
    margins least, by the larger of the two ratios.
    """
    excess = np.maximum(costs["over-refusal"] / MARGINS["over-refusal"], costs["KL"] / MARGINS["KL"])
    allowed = costs[excess <= 1]
    return float(allowed["harm"].idxmin() if len(allowed) else excess.idxmin())
