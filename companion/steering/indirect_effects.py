"""Mediation in the steered model: is the effect of the jailbreak gone, and did other components take over?

Its clean runs are steered runs, and a component's activation is what the residual stream receives from it, steering included.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from companion.base.device import to_host
from companion.base.thresholds import COMPONENTS
from companion.generation import outcomes as first_token
from companion.generation.forward import ALL, LAST, at_last_token, opened, replayed
from companion.generation.hooks import Steering, applied
from companion.mediation import estimands, outcomes
from companion.mediation.estimands import Mediator
from companion.model.activations import CleanRun, clean_run, on_output
from companion.model.architecture import Subject
from companion.prompts.tokens import Openers, TokenPair
from companion.stats.rates import Change, mean_change, ratio_change
from companion.steering.experiment import PLAIN, SteeringExperiment

HOOKED: Final = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons", "calls")
Patched = Callable[[], AbstractContextManager[object]]  # holds a component's output at a value


def test_effects(lab: SteeringExperiment, steering: Steering = PLAIN) -> pd.DataFrame:
    """`steered_effects` on the test pairs of T2; of fewer pairs and layers where each is costly."""
    study = lab.study
    wanted = estimands.mediators(study.subject, COMPONENTS, layers=study.thinned_layers)
    return steered_effects(study.subject, _test_pairs(lab), study.openers, steering, wanted)


def _test_pairs(lab: SteeringExperiment) -> list[TokenPair]:
    pairs = lab.study.thinned(len(lab.study.pairs)).of("T2")
    return [pair for pair in pairs if pair.pair.split == "test"][: lab.effort.prompts["test"]]


@torch.no_grad()
def steered_effects(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], steering: Steering = PLAIN,
    wanted: Sequence[Mediator] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The table of `estimands.measure_effects` (Y1) of the steered model, for attention and MLP outputs at the last token.

    `wanted` are those of all layers if none are given. An intervention is computed from its layer upwards, under the steering's
    hooks: at the last token alone where no other token is steered.
    """
    wanted = estimands.mediators(subject, COMPONENTS) if wanted is None else wanted
    tables = []
    for group in estimands.batches(pairs, subject):
        residuals = _patched_residuals(subject, steering, group, wanted)
        score = to_host(outcomes.log_odds(subject, residuals, openers[group[0].pair.treatment]))
        y00, y11, c01, c10 = np.split(score, [1, 2, 2 + len(wanted)], axis=1)
        cells = {name: np.broadcast_to(y, c01.shape) for name, y in (("y00", y00), ("y11", y11))}
        tables.append(estimands.tidy(group, wanted, "Y1", {**cells, "y01": c01, "y10": c10}))
    return estimands.with_estimands(pd.concat(tables, ignore_index=True))


def _patched_residuals(
    subject: Subject, steering: Steering, group: Sequence[TokenPair], wanted: Sequence[Mediator]
) -> Float[Tensor, "pair run d"]:
    """Final residual streams at the last token: of control and treated prompts, then of both with each component patched.

    Both sides stand in one batch, so a component's value from the other side is half a batch away.
    """
    tokens = torch.cat(estimands.prompt_tokens(subject, group))
    with applied(subject, steering):
        run = clean_run(subject, tokens, keep=("resid", "attn_out", "mlp_out", "cache"))
    # Some methods make a plain pass first to look at the prompt; what its hooks saw is left out.
    base = replace(run, **{name: getattr(run, name)[-subject.n_layers :] for name in HOOKED})
    plain = base if steering == PLAIN else clean_run(subject, tokens, keep=("resid", "cache"))
    # What is added to other tokens may hang on the last one: a gate, a position.
    column = LAST if at_last_token(steering) else ALL
    found = []
    for one in wanted:
        parts = subject.layers[one.layer]
        module = parts.attn_write if one.site == "attn_out" else parts.mlp_write
        value = base.site(one.site, one.layer)[:, -1:].roll(len(group), 0)

        def at_last(x: Float[Tensor, "pair pos d"], value: Tensor = value) -> Float[Tensor, "pair pos d"]:
            return torch.cat([x[:, :-1], value], dim=1)

        patched = partial(on_output, module, at_last)
        with _hooks(subject, steering, plain, one.layer, patched):
            last = _forward(subject, base, one.layer, subject.n_layers, patched, column)[-1]
        found.append(last[:, -1:])
    sides = base.resid_post[-1][:, -1:].split(len(group)), torch.cat(found, dim=1).split(len(group))
    return torch.cat([*sides[0], *sides[1]], 1)


def _forward(
    subject: Subject, base: CleanRun, start: int, end: int, patched: Patched, column: slice
) -> list[Float[Tensor, "pair pos d"]]:
    """The residual stream after each of these layers, the lowest with its component replaced."""
    hidden, found = base.resid_pre[start][:, column], []
    for layer in range(start, end):
        with patched() if layer == start else nullcontext():
            hidden = replayed(subject, base, layer, hidden)
        found.append(hidden)
    return found


def _hooks(
    subject: Subject, steering: Steering, plain: CleanRun, layer: int, patched: Patched
) -> AbstractContextManager[object]:
    """The steering's hooks for calls of single blocks.

    Gates and positions are read from a plain pass of their own, in which the component is replaced as well.
    """
    moved = [read for read in steering.reads if read.back == 0 and read.layer >= layer]
    end = max((read.layer + 1 for read in moved), default=layer)
    changed = _forward(subject, plain, layer, end, patched, LAST)
    prompt = opened(steering, plain, {read.name: changed[read.layer - layer][:, 0] for read in moved})
    return applied(subject, steering, prompt)


def share_neutralised(before: pd.DataFrame, after: pd.DataFrame) -> Change:
    """phi = 1 - E[Y(plain) - Y_s(jailbroken)] / E[Y(plain) - Y(jailbroken)] over the sides of T2 pairs, topics drawn.

    Only the jailbroken prompt is steered. 0: nothing gained; 1: it is answered like the plain one; above 1: steered past it.
    """
    plain, steered = (one.drop_duplicates("pair_id")[["pair_id", "topic", "y00", "y11"]] for one in (before, after))
    joined = plain.merge(steered, on=["pair_id", "topic"], suffixes=("", "_s"))
    gained, whole = joined.y11 - joined.y11_s, joined.y11 - joined.y00
    return ratio_change(gained.to_numpy(), whole.to_numpy(), joined.topic.to_numpy())


def shares_neutralised(lab: SteeringExperiment, arms: Mapping[str, tuple[Subject, Steering]]) -> dict[str, Change]:
    """phi of `share_neutralised` of each arm, a model and its steering, from the first answer tokens alone."""
    pairs = _test_pairs(lab)
    topics, openers = np.array([one.pair.topic for one in pairs]), lab.study.openers["T2"]

    def odds(subject: Subject, steering: Steering, side: str) -> Float[np.ndarray, "pair"]:
        texts = [str(getattr(one.pair, side)) for one in pairs]
        return first_token.log_odds_each(subject, texts, openers, [steering])[0].log_odds.to_numpy()

    plain, broken = (odds(lab.subject, PLAIN, side) for side in ("control", "treated"))
    return {name: ratio_change(broken - odds(*one, "treated"), broken - plain, topics) for name, one in arms.items()}


def share_left(before: pd.DataFrame, after: pd.DataFrame, layers: Collection[int]) -> Change | None:
    """Summed indirect effects (means of both directions) of some layers' components in the steered model over the plain one's.

    Below the steering, a value near 1 says that what it undoes is still computed, above 1 that these components work harder
    (self-repair). None where the plain model's sum may be 0: there is no share of nothing.
    """
    kept = [table[table.layer.isin(list(layers))] for table in (before, after)]
    sums = [t.assign(nie=(t.nie0 + t.nie1) / 2).groupby(["pair_id", "topic"])["nie"].sum() for t in kept]
    joined = pd.concat(sums, axis=1, keys=["before", "after"]).reset_index()
    topics, whole = joined.topic.to_numpy(), joined.before.to_numpy()
    plain = mean_change(whole, topics)
    return None if plain.low <= 0 <= plain.high else ratio_change(joined.after.to_numpy(), whole, topics)
