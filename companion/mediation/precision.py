"""In what precision a study's effects are computed, and how far that can be trusted.

Effects that are to be believed are computed in float32 with float64 read-outs. A run in bfloat16 is a screening run, and
prints its measured noise floor beside its effects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from companion.base.thresholds import COMPONENTS
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model import replay
from companion.model.activations import clean_run
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch

PAIRS = 16  # of the noise floor


@dataclass(frozen=True)
class PrecisionNoise:
    """How far effects in the subject's own precision are from those in float32: root mean square error, and two shares.

    `sign_changes` and `lost` are the shares, among effects that are not 0 in float32, that come out with the other sign
    and as 0.
    """

    rms: float
    sign_changes: float
    lost: float


def describe_precision(study: Study) -> str:
    """One line for a notebook: float32 effects, or a screening run with its noise floor for modules and for neurons."""
    if study.subject.dtype != torch.bfloat16:
        return f"effects are computed in {str(study.subject.dtype).removeprefix('torch.')}"
    floors = {site: noise_floor(study, site) for site in (*COMPONENTS, "neuron")}
    shown = "; ".join(
        f"{site} {one.rms:.3f} log-odds ({one.sign_changes:.0%} change sign, {one.lost:.0%} vanish)"
        for site, one in floors.items()
    )
    return f"SCREENING in bfloat16: do not cite these effects; measured noise floor: {shown}"


def tolerance(study: Study) -> float:
    """How far two routes to the same effect may lie apart, relative to the total effect: rounding, not a mistake."""
    facts = study.subject.facts
    return 1e-4 if facts is None else facts.tolerance


def noise_floor(study: Study, site: str) -> PrecisionNoise:
    """Noise of NIE0 (log-odds) at one site, at the last token, in every layer; of neurons, every sixteenth is measured.

    It is measured on up to 16 pairs (T2, where there are some).
    """
    treatment = "T2" if "T2" in study.treatments else study.treatments[0]
    group = estimands.batches(study.of(treatment), study.subject, size=PAIRS)[0]
    control, treated = estimands.prompt_tokens(study.subject, group)
    last = torch.zeros_like(control, dtype=torch.bool)
    last[:, -1] = True
    indices = range(0, study.subject.d_mlp, 16) if site == "neuron" else (None,)
    patches = [Patch(site, layer, last, i) for layer in range(study.subject.n_layers) for i in indices]
    openers = study.openers[treatment]
    return precision_noise(
        study.subject, control, treated, patches, lambda subject, resid: outcomes.log_odds(subject, resid, openers)
    )


@torch.no_grad()
def precision_noise(
    subject: Subject, control: Int[Tensor, "pair pos"], treated: Int[Tensor, "pair pos"], patches: Sequence[Patch],
    outcome: Callable[[Subject, Tensor], Tensor],
) -> PrecisionNoise:  # fmt: skip
    """Noise of the effects of some interventions on the control run, in the unit of the outcome.

    `outcome` maps a subject and final residuals to numbers. A float32 copy of the model is made for the comparison.
    """
    exact = find_parts(copy.deepcopy(subject.model).float(), None, f"{subject.name} in float32", subject.sha256)
    effects = []
    for one in (subject, exact):
        base, source = clean_run(one, control), clean_run(one, treated)
        patched = outcome(one, replay.interchange(one, base, source, patches)).double()
        effects.append(patched - outcome(one, base.resid_post[-1][:, None, -1:]).double())
    half, full = effects
    exists = full != 0
    shares = [float(which[exists].double().mean()) if exists.any() else 0.0 for which in (half * full < 0, half == 0)]
    return PrecisionNoise(float((half - full).pow(2).mean().sqrt()), *shares)
