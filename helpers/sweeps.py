"""The sweeps over a prompt set, one batch at a time, so that a machine may take any share of the batches.

A sweep gives tables for a batch; the tables of all batches, put behind each other in the order of the batches, are the
whole. Which pairs share a batch is a pure function of the pairs and of shapes, so who measured a batch does not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from helpers import full_response, light_cone, mediation, outcomes, parts, positions
from helpers.evidence import COMPONENTS
from helpers.progress import progress
from helpers.tokens import TokenPair

if TYPE_CHECKING:  # a study is measured by sweeps, so it imports this module
    from helpers.study import Study

LAYER_SITES = ("resid_post", *COMPONENTS)
DIRECT_SITES = tuple(f"{site}.direct" for site in COMPONENTS)
CLEAN = ["pair_id", "topic", "treatment", "split", "y00", "y11", "te", "joint", "earliest", "distance"]

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Sweep:
    """What is measured of a batch (`tables` by name), and on which treatments (empty: on all)."""

    measure: Callable[[Study, Sequence[TokenPair]], Tables]
    tables: tuple[str, ...]
    treatments: tuple[str, ...] = ()


def batches(study: Study, name: str) -> list[list[TokenPair]]:
    """The batches of a sweep, in the order of its tables."""
    treatments = SWEEPS[name].treatments
    return mediation.batches(study.of(*treatments) if treatments else study.pairs, study.subject)


def run(study: Study, name: str) -> Tables:
    """The whole sweep: parts that shards of this run have left are read, other batches are measured here."""
    sweep, groups = SWEEPS[name], batches(study, name)
    place = parts.place(study, name)
    found = [parts.measured(place, i, group, sweep, study) for i, group in enumerate(progress(groups, desc=name))]
    return {table: pd.concat([one[table] for one in found], ignore_index=True) for table in sweep.tables}


def run_shard(study: Study, name: str, shard: int, n_shards: int) -> tuple[int, int]:
    """Measure every `n_shards`-th batch from batch `shard` on, and keep each as a part; returns (measured, found)."""
    sweep, groups = SWEEPS[name], batches(study, name)
    place = parts.make(study, name)
    own = range(shard, len(groups), n_shards)
    missing = [i for i in own if parts.read(place, i, sweep.tables) is None]
    for i in progress(missing, desc=f"{name}, shard {shard + 1} of {n_shards}"):
        parts.measured(place, i, groups[i], sweep, study)
    return len(missing), len(own) - len(missing)


def clean_rows(study: Study, batch: mediation.Batch) -> pd.DataFrame:
    """One row a pair: Y1 of both clean runs, TE, joint probability of the openers, and the light cone.

    `joint` is the smaller of the two prompts' p(comply) + p(refuse); `earliest` the first layer whose residual stream
    at the last token can differ (the number of layers where none can); `distance` the tokens from the last difference
    to the last token.
    """
    openers = study.openers[batch.pairs[0].pair.treatment]
    final = [run.resid_post[-1][:, -1] for run in (batch.control, batch.treated)]
    y00, y11 = (outcomes.log_odds(study.subject, resid, openers).tolist() for resid in final)
    camps = [outcomes.camp_probabilities(study.subject, resid, openers) for resid in final]
    joint = np.minimum(*((comply + refuse).cpu().numpy() for comply, refuse in camps))
    earliest = light_cone.earliest_layers(batch.control, batch.pairs)
    rows: list[tuple[object, ...]] = []
    for i, token_pair in enumerate(batch.pairs):
        pair = token_pair.pair
        layer = study.subject.n_layers if earliest[i] is None else earliest[i]
        values = (y00[i], y11[i], y11[i] - y00[i], float(joint[i]), layer, positions.distance(token_pair))
        rows.append((pair.id, pair.topic, pair.treatment, pair.split, *values))
    return pd.DataFrame(rows, columns=CLEAN)


def _layers(study: Study, group: Sequence[TokenPair], *, direct: bool) -> Tables:
    """Residual stream, attention and MLP outputs at the last token; for T1 the residual stream also at shared tokens."""
    subject, seen = study.subject, []
    wanted = mediation.mediators(subject, (*LAYER_SITES, *(DIRECT_SITES if direct else ())))
    if group[0].pair.treatment == "T1":
        wanted += mediation.mediators(subject, ["resid_post"], ["shared"])
    names = ("Y1", "Y1.frozen", *(("contrast.frozen",) if direct else ()))
    table = mediation.batch_effects(
        subject, group, study.openers, wanted, names, watch=lambda batch: seen.append(clean_rows(study, batch))
    )
    return {"effects": table, "clean": seen[0]}


def _plain_layers(study: Study, group: Sequence[TokenPair]) -> Tables:
    return _layers(study, group, direct=False)


def _direct_layers(study: Study, group: Sequence[TokenPair]) -> Tables:
    return _layers(study, group, direct=True)


def _whole_answers(study: Study, group: Sequence[TokenPair]) -> Tables:
    wanted = mediation.mediators(study.subject, LAYER_SITES)
    return {"effects": full_response.batch_effects(study.subject, group, study.openers, wanted)}


def _modules(study: Study, group: Sequence[TokenPair]) -> Tables:
    """Direct effects of attention and MLP outputs, total and direct effects of heads, at the last token."""
    wanted = mediation.mediators(study.subject, [*DIRECT_SITES, "head", "head.direct"])
    names = ("Y1", "contrast.frozen")
    return {"effects": mediation.batch_effects(study.subject, group, study.openers, wanted, names)}


SWEEPS: Mapping[str, Sweep] = {
    "layers": Sweep(_plain_layers, ("effects", "clean")),
    "layers with direct effects": Sweep(_direct_layers, ("effects", "clean")),
    "whole answers": Sweep(_whole_answers, ("effects",), ("T2", "T2b")),
    "modules": Sweep(_modules, ("effects",)),
}
