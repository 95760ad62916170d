"""A study: one model and one prompt set, ready to be measured; and the sweeps that notebooks 02 and 03 ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from helpers import (
    evidence,
    fit,
    grid_chunks,
    mediation,
    outcomes,
    positions,
    probes,
    prompts,
    sweeps,
    thinning,
    tokens,
)
from helpers.depth import depth
from helpers.errors import InputError
from helpers.progress import progress
from helpers.prompts import Pair
from helpers.subject import Subject, load
from helpers.tokens import Openers, TokenPair

LAYER_SITES = sweeps.LAYER_SITES


@dataclass(frozen=True)
class Study:
    """Everything a measurement needs. `twins` maps a T2 pair to its T2b pair; `dropped` counts unusable pairs.

    `judge` labels an answer to a request by its content (request, answer), where one can; see `timing.generated`.
    """

    slug: str
    subject: Subject
    pairs: tuple[TokenPair, ...]
    openers: Mapping[str, Openers]
    twins: Mapping[str, str]
    dropped: Mapping[str, int]
    judge: Callable[[str, str], str] | None = None

    def of(self, *treatments: str) -> list[TokenPair]:
        """Its pairs of these treatments, in the order of the prompt set."""
        return [pair for pair in self.pairs if pair.pair.treatment in treatments]

    @property
    def treatments(self) -> tuple[str, ...]:
        """The treatments that it has pairs of: T1, T2, T2b, then the benign ones."""
        return tuple(sorted({pair.pair.treatment for pair in self.pairs}, key=prompts.treatment_order))


@dataclass(frozen=True)
class Layers:
    """What the layer sweep gives for one model; `effects` has the rows of T2 - T2b behind the others."""

    study: Study
    clean: pd.DataFrame
    effects: pd.DataFrame
    evidence: list[dict[str, object]]


def begin(
    model: str,
    prompt_set: str,
    slug: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    profile: str = "full",
    pairs: int = 0,
) -> Study:
    """Load the model and the prompt set, tokenise the pairs, and find the answer openers.

    `pairs` bounds the pairs a treatment (0: all; 24 in the smoke profile).
    """
    subject = load(model, device=device, dtype=dtype)
    content = prompts.load_set(prompt_set)
    chosen = thinning.limit(content.pairs, thinning.asked(pairs, profile))
    kept, dropped = tokens.tokenize(chosen, subject.tokenizer)
    _check_fit(subject, kept)
    twins = {p.pair.id: p.pair.twin for p in kept if p.pair.twin}
    return Study(slug, subject, tuple(kept), tokens.openers(content, subject.tokenizer), twins, dropped)


def _check_fit(subject: Subject, pairs: Sequence[TokenPair]) -> None:
    sides = [side for pair in pairs for side in (pair.control, pair.treated)]
    longest = max(len(side) for side in sides) + outcomes.STEPS
    fit.check(subject, max(int(side.max()) for side in sides), longest, "a prompt with its answer")


def own_pair(study: Study, control: str, treated: str, treatment: str) -> TokenPair:
    """A pair of the reader's own, scored by the openers of one of the study's treatments.

    Raises InputError if the two prompts have different token lengths, and says which tokens they are.
    """
    pair = Pair("own", treatment, "own", control, treated, sensitive=any(p.pair.sensitive for p in study.pairs))
    made, _ = tokens.token_pair(pair, study.subject.tokenizer)
    if made is None and pair.sensitive:
        raise InputError(
            "the prompts must have equally many tokens and differ (their texts are not shown for this set)"
        )
    if made is None:
        sides = [tokens.encode(study.subject.tokenizer, text)[0] for text in (control, treated)]
        shown = [" ".join(positions.labels(ids, study.subject.tokenizer)) for ids in sides]
        raise InputError(
            f"the prompts must have equally many tokens and differ; control has {len(sides[0])} ({shown[0]}), "
            f"treated {len(sides[1])} ({shown[1]}): swap a word for one of the same length"
        )
    return made


def clean_outcomes(study: Study) -> pd.DataFrame:
    """One row a pair: Y1 of both clean runs, TE, joint probability of the openers, and the light cone.

    The columns are those of `sweeps.clean_rows`.
    """
    groups = progress(mediation.batches(study.pairs, study.subject), desc="clean runs")
    rows = [sweeps.clean_rows(study, mediation.run_clean(study.subject, group)) for group in groups]
    return pd.concat(rows, ignore_index=True)


def clean_difference(clean: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The clean table with rows for T2 - T2b: TE of the harmful request minus TE of its harmless twin."""
    by_id = clean.set_index("pair_id")
    harmful = clean[clean.pair_id.map(twins).isin(by_id.index)]
    twin = by_id.loc[harmful.pair_id.map(twins)]
    columns = {name: harmful[name].to_numpy() - twin[name].to_numpy() for name in ("y00", "y11", "te")}
    joint = np.minimum(harmful.joint.to_numpy(), twin.joint.to_numpy())
    return pd.concat([clean, harmful.assign(treatment="T2-T2b", joint=joint, **columns)], ignore_index=True)


def module_effects(study: Study) -> pd.DataFrame:
    """Direct effects of attention and MLP outputs, total and direct effects of heads, at the last token."""
    return sweeps.run(study, "modules")["effects"]


def with_difference(table: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The effect table with the rows of T2 - T2b behind it, where there are twins."""
    return pd.concat([table, mediation.difference(table, twins)], ignore_index=True) if twins else table


def gate_rows(clean: pd.DataFrame, model: str, n_layers: int) -> list[dict[str, object]]:
    """Evidence for the gate: TE and joint probability by treatment, and the light cone of the T2 pairs."""
    rows = evidence.total_effects(clean, model)
    test = clean[clean.split == "test"]
    for treatment, part in test.groupby("treatment", sort=False):
        rows.append(evidence.mean_row(part, "joint", model, "gate", f"joint probability {treatment}"))
    generation = test[test.treatment == "T2"]
    if len(generation):
        arrives = generation.assign(at=depth(generation.earliest, n_layers))
        rows.append(evidence.mean_row(arrives, "at", model, "gate", "earliest possible depth"))
    return rows


def evidence_rows(study: Study, clean: pd.DataFrame, table: pd.DataFrame, model: str) -> list[dict[str, object]]:
    """Everything that the layer sweep knows for the ledger about one model: the gate, C1 and C3, and the precision."""
    rows = gate_rows(clean, model, study.subject.n_layers)
    bits = 1 - math.log2(torch.finfo(study.subject.dtype).eps)
    exact = {"estimate": bits, "ci_low": bits, "ci_high": bits, "n_pairs": len(study.pairs), "n_topics": 0, "note": ""}
    rows.append({"model": model, "claim": "gate", "quantity": "significand bits", "variant": "main", **exact})
    if study.of("T2"):
        rows += evidence.c1(table, model, study.subject.n_layers)
    if study.of("T1"):
        rows += probes.c3(study.subject, study.of("T1"), table, model)
    return rows


def measure_layers(study: Study, label: str, *, full_response: bool = False, direct: bool = False) -> Layers:
    """Clean runs, effects of every layer and the evidence they give, under a model label for the ledger.

    Residual stream, attention and MLP outputs of every layer at the last token, for every treatment; for T1 the
    residual stream also at the shared tokens, which C3 needs. `full_response` adds Y2 for T2 and T2b, the most
    expensive outcome; `direct` adds the direct effects of attention and MLP outputs.
    """
    found = sweeps.run(study, "layers with direct effects" if direct else "layers")
    clean, effects = found["clean"], found["effects"]
    if full_response and study.of("T2", "T2b"):
        whole = sweeps.run(study, "whole answers")["effects"]
        effects = pd.concat([effects, whole], ignore_index=True)
    clean = clean_difference(clean, study.twins) if study.twins else clean
    effects = with_difference(effects, study.twins)
    return Layers(study, clean, effects, evidence_rows(study, clean, effects, label))


def memory_plan(study: Study) -> dict[str, object]:
    """What the sweeps keep in memory above the model, estimated from shapes, and how the work is cut; for `chunks.json`.

    Megabytes are for both clean runs of the longest batch and the sweep on it; `events` are chunks that had to be
    halved for want of memory.
    """
    n_pos = max(len(pair.control) for pair in study.pairs)
    n_pairs = mediation.pairs_at_once(study.subject, n_pos)
    need = grid_chunks.memory_need(study.subject, n_pairs, n_pos)
    return {
        "longest_prompt": n_pos,
        "pairs_at_once": n_pairs,
        "tokens_at_once": grid_chunks.token_budget(study.subject, n_pos),
        "megabytes": round((2 * need.clean_run + need.sweep) / 1e6),
        "events": list(grid_chunks.chunk_events()),
    }
