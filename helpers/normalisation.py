"""Is the MLP just larger? What component effects are divided by to be fair: patch norm and number of parameters."""

from __future__ import annotations

import pandas as pd

from helpers import mediation
from helpers.evidence import COMPONENTS
from helpers.study import Study
from helpers.subject import Subject


def normalisations(study: Study) -> dict[str, pd.Series]:
    """Divisors of component effects by (site, layer), for "MLPs are just larger": patch norm and parameters."""
    treatment = "T2" if "T2" in study.treatments else study.treatments[0]
    return {"per patch norm": _patch_norms(study, treatment), "per parameter": _parameter_counts(study.subject)}


def _patch_norms(study: Study, treatment: str) -> pd.Series:
    """Mean length of the patch (treated - control activation at the last token) by (site, layer), on discover."""
    chosen = [pair for pair in study.of(treatment) if pair.pair.split == "discover"]
    totals: dict[tuple[str, int], float] = {}
    for group in mediation.batches(chosen, study.subject):
        batch = mediation.run_clean(study.subject, group)
        for mediator in mediation.mediators(study.subject, COMPONENTS):
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
