"""The four cells of every pair and mediator, and the estimands of causal mediation made of them.

For a pair with control prompt x0 and treated prompt x1 and a mediator M, the cells are y00 = Y(x0), y11 = Y(x1),
y01 = Y(x0, M set to its value under x1) and y10 = Y(x1, M set to its value under x0).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from companion.base.device import to_host
from companion.base.display import progress
from companion.mediation import outcomes
from companion.model import activations, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.model.memory import BATCH, pairs_at_once
from companion.prompts import positions
from companion.prompts.tokens import Openers, TokenPair

CELLS = ("y00", "y01", "y10", "y11")
PAIR_KEYS = ["pair_id", "topic", "treatment", "split"]
KEYS = ["site", "layer", "head", "position", "outcome"]  # what tells a pair's rows of effects apart


@dataclass(frozen=True)
class Mediator:
    """A site at a layer (and head, else -1) and position group; `.direct` sites swap only what the site writes."""

    site: str
    layer: int
    position: str = "last"
    head: int = -1


@dataclass(frozen=True)
class Batch:
    """Pairs of one treatment and one token length, with both clean runs."""

    pairs: tuple[TokenPair, ...]
    control: CleanRun
    treated: CleanRun


def pair_key(one: TokenPair) -> tuple[str, str, str, str]:
    """The values of `PAIR_KEYS`."""
    return one.pair.id, one.pair.topic, one.pair.treatment, one.pair.split


def pair_columns(pairs: Sequence[TokenPair]) -> dict[str, np.ndarray]:
    """The columns `PAIR_KEYS` of a table with a row a pair."""
    return dict(zip(PAIR_KEYS, np.array(list(map(pair_key, pairs)), dtype=object).T, strict=True))


def with_estimands(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells with `te` (total effect), `nie0` (sufficiency) and `nie1` (necessity) beside them, in the cells' unit.

    >>> cells = pd.DataFrame({"y00": [0.0], "y01": [1.0], "y10": [1.5], "y11": [4.0]})
    >>> with_estimands(cells)[["te", "nie0", "nie1"]].values.tolist()
    [[4.0, 1.0, 2.5]]
    """
    return cells.assign(te=cells.y11 - cells.y00, nie0=cells.y01 - cells.y00, nie1=cells.y11 - cells.y10)


def mediators(
    subject: Subject, sites: Iterable[str], groups: Iterable[str] = ("last",), layers: Iterable[int] | None = None
) -> list[Mediator]:
    """Every layer (or these) of every site at every position group; `head` and `head.direct` give one mediator a head."""
    heads = {True: range(subject.n_heads), False: (-1,)}
    cells = itertools.product(sites, groups, range(subject.n_layers) if layers is None else layers)
    return [Mediator(site, at, group, i) for site, group, at in cells for i in heads[site.startswith("head")]]


def batches(
    pairs: Sequence[TokenPair], subject: Subject | None = None, *, size: int = BATCH, mixed: bool = False, runs: int = 2
) -> list[list[TokenPair]]:
    """Pairs grouped by treatment and token length (`mixed`: by length alone), at most `size`, or what the subject allows.

    A pure function of the pairs, so that a rerun and a sharded run give the same bytes. Of each pair `runs` clean runs are kept.
    """

    def key(pair: TokenPair) -> tuple[str, int]:
        return "" if mixed else pair.pair.treatment, len(pair.control)

    found = []
    for (_, length), members in itertools.groupby(sorted(pairs, key=key), key=key):
        run = list(members)
        step = min(size, max(1, 2 * pairs_at_once(subject, length) // runs)) if subject else size
        found += [run[start : start + step] for start in range(0, len(run), step)]
    return found


def prompt_tokens(
    subject: Subject, pairs: Sequence[TokenPair]
) -> tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]]:
    """Control and treated token ids of pairs of equal length, on the subject's device."""
    control, treated = (np.stack([getattr(p, side) for p in pairs]) for side in ("control", "treated"))
    return subject.tensor(control), subject.tensor(treated)


def run_clean(subject: Subject, pairs: Sequence[TokenPair], beside: Sequence[TokenPair] = ()) -> Batch:
    """Both clean runs of pairs of one length and treatment.

    Both compute the same shared tokens once, so that cells with the same tokens before them are equal bit for bit; so do
    those of other pairs, as many and as long, that are run with these `beside` them.
    """
    sides = prompt_tokens(subject, pairs)
    n = activations.shared_prefix(subject, *sides, *(prompt_tokens(subject, beside) if beside else ()))
    if n:  # one call: a large model's weights are then read half as often
        both = activations.clean_run(subject, torch.cat(sides), shared=n)
        control, treated = both.rows(slice(len(pairs))), both.rows(slice(len(pairs), None))
    else:
        control, treated = (activations.clean_run(subject, side, shared=n) for side in sides)
    return Batch(tuple(pairs), control, treated)


def user_header(subject: Subject) -> str:
    """What the model's template writes before every user turn; empty for a model without a tokenizer."""
    return positions.user_header(subject.tokenizer) if subject.tokenizer is not None else ""


def patches(subject: Subject, batch: Batch, wanted: Sequence[Mediator]) -> list[Patch]:
    """The mediators as interventions on this batch: position groups become masks over the prompt's tokens."""
    tokens, header, masks = batch.control.tokens, user_header(subject), dict[str, Tensor]()
    for name in {mediator.position for mediator in wanted}:
        prompt = torch.tensor(positions.stack(batch.pairs, header, name), device=tokens.device)
        masks[name] = torch.zeros_like(tokens, dtype=torch.bool)
        masks[name][:, : prompt.shape[1]] = prompt
    return [
        Patch(m.site.removesuffix(".direct"), m.layer, masks[m.position], None if m.head < 0 else m.head)
        for m in wanted
    ]


def final_residuals(
    subject: Subject, batch: Batch, wanted: Sequence[Mediator]
) -> tuple[Float[Tensor, "pair mediator d"], Float[Tensor, "pair mediator d"]]:
    """Final residual stream at the last token for the cells 01 (control patched) and 10 (treated patched)."""
    made, runs = patches(subject, batch, wanted), (batch.control, batch.treated)
    shape, at_once = (len(batch.pairs), len(wanted), subject.d_model), pairs_at_once(subject, runs[0].tokens.shape[1])
    into, out = (torch.empty(shape, dtype=subject.dtype, device=subject.device) for _ in runs)
    whole, direct = ([i for i, m in enumerate(wanted) if m.site.endswith(".direct") == kind] for kind in (False, True))
    if some := [made[i] for i in whole]:
        into[:, whole], out[:, whole] = replay.both_ways(subject, *runs, some, some, at_once=at_once)
    if some := [made[i] for i in direct]:
        into[:, direct], out[:, direct] = (replay.direct(subject, *way, some)[:, :, 0] for way in (runs, runs[::-1]))
    return into, out


def measure_effects(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], wanted: Sequence[Mediator],
    names: Sequence[str] = ("Y1",),
) -> pd.DataFrame:  # fmt: skip
    """The four cells and their estimands, a row for each pair, mediator and outcome (`names`: see `outcomes.named_outcome`)."""
    asked, groups = dict.fromkeys(names, wanted), progress(batches(pairs, subject), desc="mediation")
    tables = (batch_effects(subject, run_clean(subject, group), openers, asked) for group in groups)
    return pd.concat(tables, ignore_index=True)


def batch_effects(
    subject: Subject, batch: Batch, openers: Mapping[str, Openers], asked: Mapping[str, Sequence[Mediator]]
) -> pd.DataFrame:
    """The rows of `measure_effects` for one batch, by outcome the mediators `asked` for; each is patched once."""
    wanted, tables = list(dict.fromkeys(itertools.chain(*asked.values()))), []
    patched, used = final_residuals(subject, batch, wanted), openers[batch.pairs[0].pair.treatment]
    place = {mediator: i for i, mediator in enumerate(wanted)}
    for outcome, some in asked.items():
        into, out = (cell[:, [place[mediator] for mediator in some]] for cell in patched)
        tables.append(tidy(batch.pairs, some, outcome, score_cells(subject, batch, (into, out), used, outcome)))
    return with_estimands(pd.concat(tables, ignore_index=True))


def score_cells(
    subject: Subject, batch: Batch, patched: tuple[Tensor, Tensor], openers: Openers, name: str = "Y1"
) -> dict[str, Float[np.ndarray, "pair _"]]:
    """The four cells of a batch in one outcome, from `final_residuals`; y00 and y11 have one column."""
    control, treated = (run.resid_post[-1][:, -1:] for run in (batch.control, batch.treated))
    # One call for all four cells: equal residuals then give equal outcomes, and an effect that is 0 comes out as 0.
    cells = torch.cat([control, treated, *patched], dim=1)
    score = to_host(outcomes.named_outcome(subject, cells, control, treated, openers, name))
    y00, y11, y01, y10 = np.split(score, [1, 2, 2 + patched[0].shape[1]], axis=1)
    return {"y00": y00, "y01": y01, "y10": y10, "y11": y11}


def whole_answer_effects(
    subject: Subject, group: Sequence[TokenPair], openers: Mapping[str, Openers], wanted: Sequence[Mediator]
) -> pd.DataFrame:
    """The rows of `measure_effects` of one batch for Y2 = log p(answer) - log p(refusal), teacher-forced, in nats.

    Answer and refusal (`outcomes.continuations`) are the same words for all four cells of a pair. Only prompt cells are
    patched; the answer's tokens see the patch through attention. Meant for pairs that share their request (T2, T2b).
    """
    prompts, texts = prompt_tokens(subject, group), []
    own = [openers[one.pair.treatment] for one in group]
    for text in outcomes.continuations(subject, *prompts, own):
        control, treated = (outcomes.forced_run(subject, prompt, text, beside=prompts) for prompt in prompts)
        made, cells = patches(subject, Batch(tuple(group), control, treated), wanted), {}
        for clean, moved, base, source in (("y00", "y01", control, treated), ("y11", "y10", treated, control)):
            resid = base.resid_post[-1][:, outcomes.decided_at(base, text)]
            cells[clean] = to_host(outcomes.sequence_log_prob(subject, resid, text))[:, None]
            cells[moved] = to_host(outcomes.patched_text_log_probs(subject, base, source, made, text))
        texts.append(cells)
    answer, refusal = texts
    return with_estimands(tidy(group, wanted, "Y2", {cell: answer[cell] - refusal[cell] for cell in CELLS}))


def tidy(
    pairs: Sequence[TokenPair], wanted: Sequence[Mediator], outcome: str, cells: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """The cells, arrays [pair, mediator] or [pair, 1], as rows in the order pair, mediator."""
    columns: dict[str, Any] = {name: np.repeat(values, len(wanted)) for name, values in pair_columns(pairs).items()}
    columns |= {name: np.tile([getattr(one, name) for one in wanted], len(pairs)) for name in KEYS[:-1]}
    columns["outcome"] = outcome
    columns |= {name: np.broadcast_to(y, (len(pairs), len(wanted))).reshape(-1) for name, y in cells.items()}
    return pd.DataFrame(columns)


def with_difference(table: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The table with rows of T2 - T2b behind it: what a wrapper does to a harmful request beyond what it does to any.

    `twins` maps a T2 pair to its T2b pair; a row without its twin's row gives none. Outcomes are subtracted row by row,
    so every estimand of the difference is the difference of the estimands; `joint` is the smaller of the two.
    """
    harmful, twin = table[table.treatment == "T2"], table[table.treatment == "T2b"]
    own, at = twin_rows(harmful, twin, twins, [name for name in (*KEYS, "set", "form") if name in table])
    if not len(own):
        return table
    made = harmful.iloc[own].assign(treatment="T2-T2b")
    for name in table.columns.intersection([*CELLS, "te", "joint", "first", "every"]):
        ours, theirs = harmful[name].to_numpy()[own], twin[name].to_numpy()[at]
        made[name] = np.minimum(ours, theirs) if name == "joint" else ours - theirs
    return pd.concat([table, with_estimands(made) if "nie0" in table else made], ignore_index=True)


def twin_rows(
    harmful: pd.DataFrame, twin: pd.DataFrame, twins: Mapping[str, str], keys: Sequence[str] = ()
) -> tuple[Int[np.ndarray, "row"], Int[np.ndarray, "row"]]:
    """Places of the T2 rows whose T2b twin has a row with the same `keys`, and the places of those rows."""
    wanted = harmful[["pair_id", *keys]].assign(pair_id=harmful.pair_id.map(twins))
    at = pd.MultiIndex.from_frame(twin[["pair_id", *keys]]).get_indexer(pd.MultiIndex.from_frame(wanted))
    return np.flatnonzero(at >= 0), at[at >= 0]
