"""What a model is compared with: its untrained twin, other seeds, and the same training with other attention.

Is the MLP just larger? What component effects are divided by to be fair: patch norm and number of parameters.

In what precision a study's effects are computed, and how far that can be trusted.

Weights may be stored in half precision; effects that are to be believed are computed in float32 (TF32 off) with float64
read-outs. A run in bfloat16 is a screening run, and prints its measured noise floor beside its effects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from companion.base import paths
from companion.base.thresholds import COMPONENTS, UNTRAINED
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model import interventions, replay
from companion.model.activations import clean_run
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch
from companion.model.load import load, untrained_twin
from companion.prompts import subsample

RELATIVE_PAIRS = 120


def shipped() -> tuple[str, ...]:
    """Names of the models that come with the companion."""
    return tuple(sorted(folder.name for folder in paths.ORGANISM.iterdir() if (folder / "config.json").is_file()))


def is_shipped(model: str) -> bool:
    """True for an embedded model, by name."""
    return model == "embedded" or model in shipped()


def relatives(model: str) -> tuple[str, ...]:
    """The other shipped models, if the model is one of them: other seeds, and the other kind of attention."""
    own = "window-0" if model == "embedded" else model
    names = sorted(shipped(), key=lambda name: (name.startswith("full"), name))
    return tuple(name for name in names if name != own) if is_shipped(model) else ()


def thinned(study: Study, n: int) -> Study:
    """The same study on at most `n` pairs a treatment, spread over topics; twins stay with their pairs."""
    kept = {pair.id for pair in subsample.subsample([token_pair.pair for token_pair in study.pairs], n)}
    return replace(study, pairs=tuple(pair for pair in study.pairs if pair.pair.id in kept))


def labels(study: Study, model: str, profile: str) -> tuple[str, ...]:
    """What a model is compared with: its untrained twin and, for a shipped model, its relatives and their twins.

    The smoke profile has the model's own twin only.
    """
    names = (study.slug, *compared(model, profile))
    return tuple(label for name in names for label in (name, name + UNTRAINED))[1:]


def compared(model: str, profile: str) -> tuple[str, ...]:
    """The relatives that the profile asks for: all, or in the smoke profile none."""
    return relatives(model) if profile == "full" else ()


def member(study: Study, model: str, label: str) -> Study:
    """The study of one of `labels`. A twin has the same architecture and fresh random weights.

    Comparisons use at most 120 pairs a treatment (in the default set: one for each topic).
    """
    name, is_twin = label.removesuffix(UNTRAINED), label.endswith(UNTRAINED)
    own = name not in relatives(model)
    subject = study.subject if own else load(name, device=str(study.subject.device), dtype="float32")
    seed = 0 if own else 1 + relatives(model).index(name)
    return replace(thinned(study, RELATIVE_PAIRS), subject=untrained_twin(subject, seed) if is_twin else subject)


def family(study: Study, model: str, profile: str) -> Iterator[tuple[str, Study]]:
    """The study of everything that a model is compared with, by label."""
    for label in labels(study, model, profile):
        yield label, member(study, model, label)


def normalisations(study: Study) -> dict[str, pd.Series]:
    """Divisors of component effects by (site, layer), for "MLPs are just larger": patch norm and parameters."""
    treatment = "T2" if "T2" in study.treatments else study.treatments[0]
    return {"per patch norm": _patch_norms(study, treatment), "per parameter": _parameter_counts(study.subject)}


def _patch_norms(study: Study, treatment: str) -> pd.Series:
    """Mean length of the patch (treated - control activation at the last token) by (site, layer), on discover."""
    chosen = [pair for pair in study.of(treatment) if pair.pair.split == "discover"]
    totals: dict[tuple[str, int], float] = {}
    for group in estimands.batches(chosen, study.subject):
        batch = estimands.run_clean(study.subject, group)
        for mediator in estimands.mediators(study.subject, COMPONENTS):
            change = batch.treated.site(mediator.site, mediator.layer) - batch.control.site(
                mediator.site, mediator.layer
            )
            key = (mediator.site, mediator.layer)
            totals[key] = totals.get(key, 0.0) + float(change[:, -1].double().norm(dim=-1).sum())
    index = pd.MultiIndex.from_tuples(totals, names=["site", "layer"])
    return pd.Series([total / len(chosen) for total in totals.values()], index=index)


def _parameter_counts(subject: Subject) -> pd.Series:
    """Parameters of each attention and MLP block by (site, layer)."""
    counts = {
        (site, layer): sum(p.numel() for p in module.parameters())
        for layer, parts in enumerate(subject.layers)
        for site, module in (("attn_out", parts.attn), ("mlp_out", parts.mlp))
    }
    return pd.Series(counts.values(), index=pd.MultiIndex.from_tuples(counts, names=["site", "layer"]), dtype=float)


PAIRS = 16


SITES = (*COMPONENTS, "neuron")


def noise_floor(study: Study, site: str) -> PrecisionNoise:
    """Root mean square error of NIE0 (log-odds) and shares of changed signs and lost effects at one site, against float32.

    Measured at the last token, in every layer, on up to 16 pairs (T2, where there are some); of neurons, every
    sixteenth. A float32 copy of the model is made.
    """
    treatment = "T2" if "T2" in study.treatments else study.treatments[0]
    group = estimands.batches(study.of(treatment), study.subject, size=PAIRS)[0]
    openers = study.openers[treatment]
    control, treated = estimands.prompt_tokens(study.subject, group)
    last = torch.zeros_like(control, dtype=torch.bool)
    last[:, -1] = True
    indices = range(0, study.subject.d_mlp, 16) if site == "neuron" else (None,)
    patches = [interventions.Patch(site, layer, last, i) for layer in range(study.subject.n_layers) for i in indices]

    def score(subject: Subject, resid: Tensor) -> Tensor:
        return outcomes.log_odds(subject, resid, openers)

    return precision_noise(study.subject, control, treated, patches, score)


def describe(study: Study) -> str:
    """One line for a notebook: float32 effects, or a screening run with its noise floor for modules and for neurons."""
    if study.subject.dtype != torch.bfloat16:
        return f"effects are computed in {str(study.subject.dtype).removeprefix('torch.')}"
    floors = {site: noise_floor(study, site) for site in SITES}
    shown = "; ".join(
        f"{site} {one.rms:.3f} log-odds ({one.sign_changes:.0%} change sign, {one.lost:.0%} vanish)"
        for site, one in floors.items()
    )
    return f"SCREENING in bfloat16: do not cite these effects; measured noise floor: {shown}"


def tolerance(study: Study) -> float:
    """How far two routes to the same effect may lie apart, relative to the total effect: rounding, not a mistake."""
    return 0.2 if study.subject.dtype == torch.bfloat16 else 1e-4


@dataclass(frozen=True)
class PrecisionNoise:
    """How far effects in the subject's own precision are from those in float32.

    `sign_changes` and `lost` are the shares, among effects that are not 0 in float32, that come out with the other sign
    and as 0.
    """

    rms: float
    sign_changes: float
    lost: float


@torch.no_grad()
def precision_noise(
    subject: Subject,
    control: Int[Tensor, "pair pos"],
    treated: Int[Tensor, "pair pos"],
    patches: Sequence[Patch],
    outcome: Callable[[Subject, Tensor], Tensor],
) -> PrecisionNoise:
    """The noise floor of a screening run in half precision, to be printed beside its effects, in the outcome's unit.

    `outcome` maps a subject and final residuals to numbers. A float32 copy of the model is made for the comparison.
    """
    exact = find_parts(copy.deepcopy(subject.model).float(), None, f"{subject.name} in float32", subject.sha256)
    half, full = (_effects(one, control, treated, patches, outcome) for one in (subject, exact))
    exists = full != 0
    shares = [float(which[exists].double().mean()) if exists.any() else 0.0 for which in (half * full < 0, half == 0)]
    return PrecisionNoise(float((half - full).pow(2).mean().sqrt()), *shares)


def _effects(
    subject: Subject,
    control: Int[Tensor, "pair pos"],
    treated: Int[Tensor, "pair pos"],
    patches: Sequence[Patch],
    outcome: Callable[[Subject, Tensor], Tensor],
) -> Tensor:
    base, source = clean_run(subject, control), clean_run(subject, treated)
    patched = outcome(subject, replay.interchange(subject, base, source, patches)).double()
    return patched - outcome(subject, base.resid_post[-1][:, None, -1:]).double()
