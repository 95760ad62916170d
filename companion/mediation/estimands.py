"""Causal mediation: the four cells of every pair and mediator, and the estimands derived from them.

For a pair with control prompt x0 and treated prompt x1 and a mediator M, the cells are y00 = Y(x0), y11 = Y(x1),
y01 = Y(x0, M set to its value under x1) and y10 = Y(x1, M set to its value under x0). Everything else is arithmetic
on them, done in one place (`estimands`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.display import progress
from companion.mediation import outcomes
from companion.model import activations, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.model.memory import BATCH, pairs_at_once
from companion.model.replay import both_ways
from companion.prompts import positions
from companion.prompts.tokens import Openers, TokenPair

KEYS = ["site", "layer", "head", "position", "outcome"]


@dataclass(frozen=True)
class Mediator:
    """A site at a layer (and head, else -1) and position group; `.direct` sites swap only what the site writes."""

    site: str
    layer: int
    position: str = "last"
    head: int = -1

    @property
    def is_direct(self) -> bool:
        """True if only the site's own write into the final residual stream is swapped."""
        return self.site.endswith(".direct")


@dataclass(frozen=True)
class Batch:
    """Pairs of one treatment and one token length, with both clean runs."""

    pairs: tuple[TokenPair, ...]
    control: CleanRun
    treated: CleanRun


def estimands(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with `te` (total effect), `nie0` (sufficiency) and `nie1` (necessity) beside them, in the cells' unit.

    >>> cells = pd.DataFrame({"y00": [0.0], "y01": [1.0], "y10": [1.5], "y11": [4.0]})
    >>> estimands(cells)[["te", "nie0", "nie1"]].values.tolist()
    [[4.0, 1.0, 2.5]]
    """
    return cells.assign(
        te=cells.y11 - cells.y00,
        nie0=cells.y01 - cells.y00,
        nie1=cells.y11 - cells.y10,
    )


def mediators(subject: Subject, sites: Iterable[str], groups: Iterable[str] = ("last",)) -> list[Mediator]:
    """Every layer of every site at every position group; `head` and `head.direct` give one mediator a head."""
    found = []
    for site, group, layer in itertools.product(sites, groups, range(subject.n_layers)):
        heads = range(subject.n_heads) if site.startswith("head") else (-1,)
        found += [Mediator(site, layer, group, head) for head in heads]
    return found


def batches(
    pairs: Sequence[TokenPair], subject: Subject | None = None, *, size: int = BATCH, mixed: bool = False
) -> list[list[TokenPair]]:
    """Pairs grouped by treatment and token length, at most `size` together, or as many as the subject allows.

    A pure function of the list of pairs, so that a rerun and a sharded run put the same pairs together and give the
    same bytes; pairs of one length need no padding. `mixed` groups by length alone, for what does not depend on the
    treatment, such as decoding.
    """

    def key(pair: TokenPair) -> tuple[str, int]:
        return "" if mixed else pair.pair.treatment, len(pair.control)

    found = []
    for (_, length), members in itertools.groupby(sorted(pairs, key=key), key=key):
        run = list(members)
        step = min(size, pairs_at_once(subject, length)) if subject else size
        found += [run[start : start + step] for start in range(0, len(run), step)]
    return found


def prompt_tokens(
    subject: Subject, pairs: Sequence[TokenPair]
) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]]:
    """Control and treated token ids of pairs of equal length, on the subject's device."""
    control, treated = (np.stack([getattr(p, side) for p in pairs]) for side in ("control", "treated"))
    return torch.tensor(control, device=subject.device), torch.tensor(treated, device=subject.device)


def run_clean(subject: Subject, pairs: Sequence[TokenPair]) -> Batch:
    """Both clean runs of pairs of one treatment and one length."""
    control, treated = prompt_tokens(subject, pairs)
    return Batch(tuple(pairs), activations.clean_run(subject, control), activations.clean_run(subject, treated))


def patches(batch: Batch, wanted: Sequence[Mediator], header: str) -> list[Patch]:
    """The mediators as interventions on this batch: position groups become masks over its tokens."""
    names = {mediator.position for mediator in wanted}
    device = batch.control.tokens.device
    masks = {name: torch.tensor(positions.stack(batch.pairs, header, name), device=device) for name in names}
    return [
        Patch(m.site.removesuffix(".direct"), m.layer, masks[m.position], None if m.head < 0 else m.head)
        for m in wanted
    ]


def final_residuals(
    subject: Subject, batch: Batch, wanted: Sequence[Mediator], header: str
) -> tuple[Float[Tensor, "pair mediator d"], Float[Tensor, "pair mediator d"]]:
    """Final residual stream at the last token for the cells 01 (control patched) and 10 (treated patched)."""
    made, runs = patches(batch, wanted, header), (batch.control, batch.treated)
    shape, at_once = (len(batch.pairs), len(wanted), subject.d_model), pairs_at_once(subject, runs[0].tokens.shape[1])
    cells = [torch.empty(shape, dtype=subject.dtype, device=subject.device) for _ in runs]
    for is_direct in {mediator.is_direct for mediator in wanted}:
        chosen = [i for i, mediator in enumerate(wanted) if mediator.is_direct == is_direct]
        some = [made[i] for i in chosen]
        if is_direct:
            found = [replay.direct(subject, *order, some)[:, :, 0] for order in (runs, runs[::-1])]
        else:
            found = list(both_ways(subject, *runs, some, some, at_once=at_once))
        for cell, values in zip(cells, found, strict=True):
            cell[:, chosen] = values
    return cells[0], cells[1]


def measure_effects(
    subject: Subject,
    pairs: Sequence[TokenPair],
    openers: Mapping[str, Openers],
    wanted: Sequence[Mediator] | Callable[[str], Sequence[Mediator]],
    names: Sequence[str] = ("Y1",),
    *,
    watch: Callable[[Batch], None] | None = None,
) -> pd.DataFrame:
    """Tidy table of the four cells and their estimands: one row for each pair, mediator and outcome.

    `wanted` may depend on the treatment. `names` are among "Y1" (log-odds), "Y1.frozen" and "contrast.frozen" (the
    final norm's scale held at the control run's, in all four cells, so that direct effects add up). `watch` is shown
    every batch of clean runs, for what else is to be read off them.
    """
    tables = []
    for group in progress(batches(pairs, subject), desc="mediation"):
        chosen = wanted(group[0].pair.treatment) if callable(wanted) else wanted
        tables.append(batch_effects(subject, group, openers, chosen, names, watch=watch))
    return pd.concat(tables, ignore_index=True)


def batch_effects(
    subject: Subject,
    group: Sequence[TokenPair],
    openers: Mapping[str, Openers],
    wanted: Sequence[Mediator],
    names: Sequence[str] = ("Y1",),
    *,
    watch: Callable[[Batch], None] | None = None,
) -> pd.DataFrame:
    """The rows of `effects` for one batch: pairs of one treatment and one length."""
    header = positions.user_header(subject.tokenizer) if subject.tokenizer is not None else ""
    batch = run_clean(subject, group)
    if watch:
        watch(batch)
    patched = final_residuals(subject, batch, wanted, header)
    used = openers[group[0].pair.treatment]
    tables = [tidy(group, wanted, name, score(subject, batch, patched, used, name)) for name in names]
    return estimands(pd.concat(tables, ignore_index=True))


def score(
    subject: Subject, batch: Batch, patched: tuple[Tensor, Tensor], openers: Openers, name: str
) -> dict[str, Float[np.ndarray, "pair mediator"]]:
    """The four cells of a batch in one outcome of `effects`, from the residual streams of `final_residuals`."""
    control, treated = (run.resid_post[-1][:, -1:] for run in (batch.control, batch.treated))
    norm_like = control if name.endswith(".frozen") else None
    # One call for all four cells: equal residuals then give equal outcomes, and an effect that is 0 comes out as 0.
    cells = torch.cat([control, treated, *patched], dim=1)
    if name.startswith("contrast"):
        weights = outcomes.opener_weights(subject, control, treated, openers)
        score = outcomes.contrast(subject, cells, openers, norm_like, weights).cpu().numpy()
    else:
        score = outcomes.log_odds(subject, cells, openers, norm_like).cpu().numpy()
    y00, y11, y01, y10 = np.split(score, [1, 2, 2 + patched[0].shape[1]], axis=1)
    shape = y01.shape
    return {"y00": np.broadcast_to(y00, shape), "y01": y01, "y10": y10, "y11": np.broadcast_to(y11, shape)}


def tidy(
    pairs: Sequence[TokenPair], wanted: Sequence[Mediator], outcome: str, cells: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Rows in the order pair, mediator."""
    n = len(wanted)
    per_pair = {
        "pair_id": [p.pair.id for p in pairs],
        "topic": [p.pair.topic for p in pairs],
        "treatment": [p.pair.treatment for p in pairs],
        "split": [p.pair.split for p in pairs],
    }
    per_mediator = {name: [getattr(m, name) for m in wanted] for name in ("site", "layer", "head", "position")}
    return pd.DataFrame(
        {
            **{name: np.repeat(np.array(values, dtype=object), n) for name, values in per_pair.items()},
            **{name: np.tile(np.array(values), len(pairs)) for name, values in per_mediator.items()},
            "outcome": outcome,
            **{name: values.reshape(-1) for name, values in cells.items()},
        }
    )


def difference(table: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The contrast T2 - T2b, pair by pair: what a wrapper does to a harmful request beyond what it does to any.

    `twins` maps a T2 pair to its T2b pair. Cells are subtracted, so every estimand of the difference is the
    difference of the estimands.
    """
    harmful = table[table.treatment == "T2"]
    harmful = harmful.assign(twin_id=harmful.pair_id.map(twins)).dropna(subset=["twin_id"])
    cells = ["y00", "y01", "y10", "y11"]
    twin = table.loc[table.treatment == "T2b", ["pair_id", *KEYS, *cells]].rename(columns={"pair_id": "twin_id"})
    joined = harmful.merge(twin, on=["twin_id", *KEYS], suffixes=("", "_twin"), validate="many_to_one")
    subtracted = {cell: joined[cell] - joined[f"{cell}_twin"] for cell in cells}
    result = joined.assign(treatment="T2-T2b", **subtracted)
    return estimands(result.drop(columns=["twin_id", *(f"{cell}_twin" for cell in cells)]))


def clean_difference(clean: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The clean table with rows for T2 - T2b: TE of the harmful request minus TE of its harmless twin."""
    by_id = clean.set_index("pair_id")
    harmful = clean[clean.pair_id.map(twins).isin(by_id.index)]
    twin = by_id.loc[harmful.pair_id.map(twins)]
    columns = {name: harmful[name].to_numpy() - twin[name].to_numpy() for name in ("y00", "y11", "te")}
    joint = np.minimum(harmful.joint.to_numpy(), twin.joint.to_numpy())
    return pd.concat([clean, harmful.assign(treatment="T2-T2b", joint=joint, **columns)], ignore_index=True)


def with_difference(table: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The effect table with the rows of T2 - T2b behind it, where there are twins."""
    return pd.concat([table, difference(table, twins)], ignore_index=True) if twins else table
