"""A study: one model and one prompt set, ready to be measured; and the sweeps that notebooks 02 and 03 ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from helpers import evidence, light_cone, mediation, outcomes, paths, positions, probes, prompts, tokens
from helpers.evidence import COMPONENTS
from helpers.progress import progress
from helpers.subject import Subject, load
from helpers.tokens import Openers, TokenPair

SMOKE_PAIRS = 24
LAYER_SITES = ("resid_post", *COMPONENTS)


@dataclass(frozen=True)
class Study:
    """Everything a measurement needs. `twins` maps a T2 pair to its T2b pair; `dropped` counts unusable pairs."""

    slug: str
    subject: Subject
    pairs: tuple[TokenPair, ...]
    openers: Mapping[str, Openers]
    twins: Mapping[str, str]
    dropped: Mapping[str, int]

    def of(self, *treatments: str) -> list[TokenPair]:
        """Its pairs of these treatments, in the order of the prompt set."""
        return [pair for pair in self.pairs if pair.pair.treatment in treatments]

    @property
    def treatments(self) -> tuple[str, ...]:
        """The treatments that it has pairs of: T1, T2, T2b, then the benign ones."""
        return tuple(sorted({pair.pair.treatment for pair in self.pairs}, key=prompts.treatment_order))


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
    chosen = prompts.limit(content.pairs, pairs or (SMOKE_PAIRS if profile == "smoke" else 0))
    kept, dropped = tokens.tokenize(chosen, subject.tokenizer)
    twins = {p.pair.id: p.pair.twin for p in kept if p.pair.twin}
    return Study(slug, subject, tuple(kept), tokens.openers(content, subject.tokenizer), twins, dropped)


def relatives(model: str) -> tuple[str, ...]:
    """The other shipped models, if the model is one of them: other seeds, and the other kind of attention."""
    shipped = sorted(folder.name for folder in paths.ORGANISM.iterdir() if (folder / "config.json").is_file())
    own = "window-0" if model == "embedded" else model
    return tuple(name for name in sorted(shipped, reverse=True) if name != own) if own in shipped else ()


def with_model(study: Study, subject: Subject) -> Study:
    """The same prompts on a relative of the model (same tokenizer) or its untrained twin."""
    return replace(study, subject=subject)


def clean_outcomes(study: Study) -> pd.DataFrame:
    """One row a pair: Y1 of both clean runs, TE, joint probability of the openers, and the light cone.

    `joint` is the smaller of the two prompts' p(comply) + p(refuse); `earliest` the first layer whose residual stream
    at the last token can differ (the number of layers where none can); `distance` the tokens from the last difference
    to the last token.
    """
    rows = []
    for group in progress(mediation.batches(study.pairs), desc="clean runs"):
        batch = mediation.run_clean(study.subject, group)
        openers = study.openers[group[0].pair.treatment]
        final = [run.resid_post[-1][:, -1] for run in (batch.control, batch.treated)]
        y00, y11 = (outcomes.log_odds(study.subject, resid, openers).tolist() for resid in final)
        joint = np.minimum(*(sum(outcomes.camp_probabilities(study.subject, r, openers)).cpu() for r in final))
        earliest = light_cone.earliest_layers(batch.control, group)
        for i, pair in enumerate(group):
            layer = study.subject.n_layers if earliest[i] is None else earliest[i]
            values = (y00[i], y11[i], y11[i] - y00[i], float(joint[i]), layer, positions.distance(pair))
            rows.append((pair.pair.id, pair.pair.topic, pair.pair.treatment, pair.pair.split, *values))
    names = ("pair_id", "topic", "treatment", "split", "y00", "y11", "te", "joint", "earliest", "distance")
    return pd.DataFrame(rows, columns=list(names))


def clean_difference(clean: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """The clean table with rows for T2 - T2b: TE of the harmful request minus TE of its harmless twin."""
    by_id = clean.set_index("pair_id")
    harmful = clean[clean.pair_id.map(twins).isin(by_id.index)]
    twin = by_id.loc[harmful.pair_id.map(twins)]
    columns = {name: harmful[name].to_numpy() - twin[name].to_numpy() for name in ("y00", "y11", "te")}
    joint = np.minimum(harmful.joint.to_numpy(), twin.joint.to_numpy())
    return pd.concat([clean, harmful.assign(treatment="T2-T2b", joint=joint, **columns)], ignore_index=True)


def layer_effects(study: Study, names: Sequence[str] = ("Y1", "Y1.frozen")) -> pd.DataFrame:
    """Residual stream, attention and MLP outputs of every layer at the last token, for every treatment.

    For T1 the residual stream is also patched at the shared tokens (`shared`), which C3 needs.
    """
    wanted = mediation.mediators(study.subject, LAYER_SITES)
    parts = [mediation.effects(study.subject, study.pairs, study.openers, wanted, names)]
    recognition = study.of("T1")
    if recognition:
        shared = mediation.mediators(study.subject, ["resid_post"], ["shared"])
        parts.append(mediation.effects(study.subject, recognition, study.openers, shared, ("Y1",)))
    return pd.concat(parts, ignore_index=True)


def module_effects(study: Study, *, heads: bool = True) -> pd.DataFrame:
    """Direct effects of attention and MLP outputs and, on demand, total and direct effects of heads (last token)."""
    wanted = mediation.mediators(study.subject, [f"{site}.direct" for site in COMPONENTS])
    if heads:
        wanted += mediation.mediators(study.subject, ["head", "head.direct"])
    return mediation.effects(study.subject, study.pairs, study.openers, wanted, ("Y1", "contrast.frozen"))


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
        arrives = generation.assign(at=evidence.depth(generation.earliest, n_layers))
        rows.append(evidence.mean_row(arrives, "at", model, "gate", "earliest possible depth"))
    return rows


def evidence_rows(study: Study, clean: pd.DataFrame, table: pd.DataFrame, model: str) -> list[dict[str, object]]:
    """Everything that notebook 02 knows for the ledger about one model: the gate, C1 and C3."""
    rows = gate_rows(clean, model, study.subject.n_layers)
    if study.of("T2"):
        rows += evidence.c1(table, model, study.subject.n_layers)
    if study.of("T1"):
        rows += probes.c3(study.subject, study.of("T1"), table, model)
    return rows


def patch_norms(study: Study, treatment: str) -> pd.Series:
    """Mean length of the patch (treated - control activation at the last token) by (site, layer), on discover."""
    chosen = [pair for pair in study.of(treatment) if pair.pair.split == "discover"]
    totals: dict[tuple[str, int], float] = {}
    for group in mediation.batches(chosen):
        batch = mediation.run_clean(study.subject, group)
        for mediator in mediation.mediators(study.subject, COMPONENTS):
            change = batch.treated.site(mediator.site, mediator.layer) - batch.control.site(
                mediator.site, mediator.layer
            )
            key = (mediator.site, mediator.layer)
            totals[key] = totals.get(key, 0.0) + float(change[:, -1].double().norm(dim=-1).sum())
    index = pd.MultiIndex.from_tuples(totals, names=["site", "layer"])
    return pd.Series([total / len(chosen) for total in totals.values()], index=index)


def parameter_counts(subject: Subject) -> pd.Series:
    """Parameters of each attention and MLP block by (site, layer)."""
    counts = {
        (site, layer): sum(p.numel() for p in module.parameters())
        for layer, parts in enumerate(subject.layers)
        for site, module in (("attn_out", parts.attn), ("mlp_out", parts.mlp))
    }
    return pd.Series(counts.values(), index=pd.MultiIndex.from_tuples(counts, names=["site", "layer"]), dtype=float)
