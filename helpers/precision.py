"""In what precision a study's effects are computed, and how far that can be trusted.

Weights may be stored in half precision; effects that are to be believed are computed in float32 (TF32 off) with float64
read-outs. A run in bfloat16 is a screening run, and prints its measured noise floor beside its effects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import mediation, outcomes, screen
from helpers.evidence import COMPONENTS
from helpers.screen import PrecisionNoise
from helpers.study import Study
from helpers.subject import Subject

PAIRS = 16
SITES = (*COMPONENTS, "neuron")


def noise_floor(study: Study, site: str) -> PrecisionNoise:
    """Root mean square error of NIE0 (log-odds) and shares of changed signs and lost effects at one site, against float32.

    Measured at the last token, in every layer, on up to 16 pairs (T2, where there are some); of neurons, every
    sixteenth. A float32 copy of the model is made.
    """
    treatment = "T2" if "T2" in study.treatments else study.treatments[0]
    group = mediation.batches(study.of(treatment), study.subject, size=PAIRS)[0]
    openers = study.openers[treatment]
    control, treated = mediation.prompt_tokens(study.subject, group)
    last = torch.zeros_like(control, dtype=torch.bool)
    last[:, -1] = True
    indices = range(0, study.subject.d_mlp, 16) if site == "neuron" else (None,)
    patches = [mediation.Patch(site, layer, last, i) for layer in range(study.subject.n_layers) for i in indices]

    def score(subject: Subject, resid: Tensor) -> Tensor:
        return outcomes.log_odds(subject, resid, openers)

    return screen.precision_noise(study.subject, control, treated, patches, score)


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
