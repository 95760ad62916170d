"""Mediation in the steered model: is the effect of the jailbreak gone, and did other components take over?

The steered model is a model of its own: its clean runs are steered runs, and a component's activation is what the
residual stream receives from it, steering included.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from helpers import defence_stats, mediation, outcomes, positions, reference
from helpers.defence_outcomes import Steer
from helpers.defence_stats import Change
from helpers.evidence import COMPONENTS
from helpers.grid_run import CleanRun
from helpers.mediation import Batch
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair


@torch.no_grad()
def steered_effects(
    subject: Subject,
    pairs: Sequence[TokenPair],
    openers: Mapping[str, Openers],
    layers: Collection[int],
    steer: Steer = nullcontext,
) -> pd.DataFrame:
    """The table of `mediation.effects` (Y1, attention and MLP outputs at the last token) of the steered model.

    Every intervention is one full forward pass under the steering hooks: the grid's shortcuts replay single layers, and
    hooks that look at the whole prompt would not see it.
    """
    header = positions.user_header(subject.tokenizer)
    wanted = [one for one in mediation.mediators(subject, COMPONENTS) if one.layer in layers]
    tables = []
    for group in mediation.batches(pairs, subject):
        with steer():
            batch = _steered_pass(subject, mediation.run_clean(subject, group))
            made = mediation.patches(batch, wanted, header)
            runs = ((batch.control, batch.treated), (batch.treated, batch.control))
            y01, y10 = (reference.interchange(subject, base, source, made)[:, :, 0] for base, source in runs)
        finals = [run.resid_post[-1][:, -1:] for run in (batch.control, batch.treated)]
        treatment = group[0].pair.treatment
        score = outcomes.log_odds(subject, torch.cat([*finals, y01, y10], 1), openers[treatment]).cpu().numpy()
        y00, y11, c01, c10 = np.split(score, [1, 2, 2 + len(wanted)], axis=1)
        cells = {name: np.broadcast_to(y, c01.shape) for name, y in (("y00", y00), ("y11", y11))}
        tables.append(mediation.tidy(group, wanted, "Y1", {**cells, "y01": c01, "y10": c10}))
    return mediation.estimands(pd.concat(tables, ignore_index=True))


def _steered_pass(subject: Subject, batch: Batch) -> Batch:
    """The batch without what its hooks saw of a plain pass, which some methods make first to look at the prompt."""

    def last(run: CleanRun) -> CleanRun:
        names = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "neurons", "calls")
        return replace(run, **{name: getattr(run, name)[-subject.n_layers :] for name in names})

    return replace(batch, control=last(batch.control), treated=last(batch.treated))


def neutralised(before: pd.DataFrame, after: pd.DataFrame) -> Change:
    """phi = 1 - E[Y(plain) - Y_s(jailbroken)] / E[Y(plain) - Y(jailbroken)], topics drawn.

    Plain and jailbroken are the two sides of a T2 pair; only the jailbroken prompt is steered. 0: nothing gained; 1: the
    jailbroken prompt is answered like the plain one; above 1: steered past it.
    """
    joined = _one_row_a_pair(before).merge(_one_row_a_pair(after), on=["pair_id", "topic"], suffixes=("", "_s"))
    return defence_stats.ratio_change(
        (joined.y11 - joined.y11_s).to_numpy(), (joined.y11 - joined.y00).to_numpy(), joined.topic.to_numpy()
    )


def _one_row_a_pair(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop_duplicates("pair_id")[["pair_id", "topic", "y00", "y11"]]


def after_before(before: pd.DataFrame, after: pd.DataFrame, layers: Collection[int]) -> Change:
    """Summed indirect effects of the components of some layers in the steered model over those in the plain one.

    Effects are means of both directions, summed over components. Where steering sits above, a value near 1 says that
    what it undoes is still computed; above 1 it says that components below it work harder (self-repair).
    """
    sums = [
        table[table.layer.isin(list(layers))].assign(nie=(table.nie0 + table.nie1) / 2).groupby(["pair_id", "topic"])["nie"].sum()
        for table in (before, after)
    ]  # fmt: skip
    joined = pd.concat(sums, axis=1, keys=["before", "after"]).reset_index()
    return defence_stats.ratio_change(joined.after.to_numpy(), joined.before.to_numpy(), joined.topic.to_numpy())
