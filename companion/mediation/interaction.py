"""Where the decision is computed: which components turn wrapper and request into more than the sum of the two.

An indirect effect says that a component passes the decision on, a direct effect that it writes it into the logits; a head
that copies what an earlier layer decided has both. What tells computing from copying is the interaction. For the four
prompts (harmless or harmful request) x (neutral or jailbreak wrapper), the input that a component f *would* get if
everything before it were additive is h10 + h01 - h00, and what f computes from it beyond the sum of its own outputs is

    G = f(h10 + h01 - h00) - f(h10) - f(h01) + f(h00)

A linear copy has G = 0, whatever it copies. The effect of G is measured as any other: taken away from the jailbroken
harmful run, or added to the neutral harmful one, at all positions, with everything above live.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from companion.base.display import progress
from companion.base.thresholds import COMPONENTS
from companion.mediation import estimands, outcomes, summaries
from companion.mediation.estimands import Mediator
from companion.mediation.study import Study
from companion.model import memory, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch, component_output
from companion.prompts.tokens import TokenPair

VARIANTS = tuple(one for one in summaries.VARIANTS if one.name not in ("full response", "norm frozen"))
SIGNS = {"10": 1, "01": 1, "00": -1}  # first digit: harmful request, second: jailbreak wrapper


def interaction_output(
    subject: Subject, runs: Mapping[str, CleanRun], site: str, layer: int
) -> Float[Tensor, "pair pos d"]:
    """G of one component, from the clean runs of the four prompts ("11", "10", "01", "00")."""
    ahead = {name: run.resid_pre[layer] for name, run in runs.items()}
    if site == "mlp_out":
        ahead = {name: h + runs[name].attn_out[layer] for name, h in ahead.items()}
    additive = sum((sign * ahead[name] for name, sign in SIGNS.items()), torch.zeros_like(ahead["00"]))
    summed = sum((sign * runs[name].site(site, layer) for name, sign in SIGNS.items()), torch.zeros_like(additive))
    return component_output(subject, runs["11"], site, layer, additive) - summed


def interaction_effects(study: Study) -> pd.DataFrame:
    """Effect of what each component computes, in the schema of `estimands.measure_effects`: treatment T2-T2b, outcome Y1.

    `nie1` is what the jailbroken harmful run loses without it, `nie0` what the neutral harmful run gains by it; TE is that
    of T2 - T2b. No rows where no twins have prompts of one length.
    """

    def length(both: tuple[TokenPair, TokenPair]) -> int:
        return len(both[0].control)

    tables = []
    pairs = sorted(study.with_twins(study.of("T2")), key=length)
    for n_pos, members in progress(
        [(n, list(some)) for n, some in itertools.groupby(pairs, key=length)], desc="computed"
    ):
        step = memory.pairs_at_once(study.subject, n_pos)
        tables += [_batch(study, members[start : start + step]) for start in range(0, len(members), step)]
    return estimands.with_estimands(pd.concat(tables, ignore_index=True)) if tables else pd.DataFrame()


def _batch(study: Study, both: Sequence[tuple[TokenPair, TokenPair]]) -> pd.DataFrame:
    subject, pairs = study.subject, [pair for pair, _ in both]
    harmful, harmless = (estimands.run_clean(subject, one) for one in (pairs, [twin for _, twin in both]))
    runs = {"10": harmful.control, "11": harmful.treated, "00": harmless.control, "01": harmless.treated}
    wanted = [Mediator(site, layer, "all") for site in COMPONENTS for layer in range(subject.n_layers)]
    more = [interaction_output(subject, runs, one.site, one.layer) for one in wanted]
    everywhere = torch.ones_like(harmful.control.tokens, dtype=torch.bool)

    def changed(base: CleanRun, sign: int) -> Float[np.ndarray, "pair component"]:
        patches = [
            Patch(one.site, one.layer, everywhere, value=base.site(one.site, one.layer) + sign * change)
            for one, change in zip(wanted, more, strict=True)
        ]
        resid = replay.interchange(subject, base, base, patches)[:, :, 0]
        return outcomes.log_odds(subject, resid, study.openers["T2"]).cpu().numpy()

    odds = {}
    for name, run in runs.items():
        openers = study.openers["T2" if name[0] == "1" else "T2b"]
        odds[name] = outcomes.log_odds(subject, run.resid_post[-1][:, -1:], openers).cpu().numpy()
    y11 = odds["11"] - odds["01"] + odds["00"]  # so that y11 - y00 is TE of T2 - T2b, and y00 that of the harmful run
    lost, shape = odds["11"] - changed(harmful.treated, -1), (len(pairs), len(wanted))
    cells = {
        "y00": np.broadcast_to(odds["10"], shape), "y01": changed(harmful.control, 1),
        "y10": y11 - lost, "y11": np.broadcast_to(y11, shape),
    }  # fmt: skip
    return estimands.tidy(pairs, wanted, "Y1", cells).assign(treatment="T2-T2b")
