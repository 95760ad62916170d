"""What a model is compared with: its untrained twin, other seeds, and the same training with other attention.

Also what component effects are divided by, so that MLPs do not win by being larger: patch norm and number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd

from companion.base import paths
from companion.base.thresholds import COMPONENTS, UNTRAINED
from companion.mediation import estimands
from companion.mediation.study import Study
from companion.model.load import load, untrained_twin

CONTROL_PAIRS = 120  # a treatment: in the default set one for each topic


def shipped() -> tuple[str, ...]:
    """Names of the models that come with the companion."""
    return tuple(sorted(folder.name for folder in paths.ORGANISM.iterdir() if (folder / "config.json").is_file()))


def is_shipped(model: str) -> bool:
    """True for an embedded model, by name."""
    return model == "embedded" or model in shipped()


def other_shipped(model: str, profile: str = "full") -> tuple[str, ...]:
    """The other shipped models, if the model is one of them: other seeds, then the other kind of attention.

    The smoke profile compares with none of them.
    """
    own = "window-0" if model == "embedded" else model
    names = sorted(shipped(), key=lambda name: (name.startswith("full"), name))
    return tuple(name for name in names if name != own) if is_shipped(model) and profile == "full" else ()


def control_study(study: Study, model: str, label: str) -> Study:
    """The study of one control model by its label, on at most 120 pairs a treatment.

    An untrained twin has the same architecture and fresh random weights.
    """
    name, is_twin, others = label.removesuffix(UNTRAINED), label.endswith(UNTRAINED), other_shipped(model)
    subject, seed = study.subject, 0
    if name in others:
        subject, seed = load(name, device=str(subject.device), dtype="float32"), 1 + others.index(name)
    return replace(study.subsample(CONTROL_PAIRS), subject=untrained_twin(subject, seed) if is_twin else subject)


def control_studies(study: Study, model: str, profile: str) -> Iterator[tuple[str, Study]]:
    """Label and study of every control model: the model's untrained twin, `other_shipped` models and their twins."""
    for name in (study.slug, *other_shipped(model, profile)):
        for label in (name, name + UNTRAINED):
            if label != study.slug:
                yield label, control_study(study, model, label)


def normalisations(study: Study) -> dict[str, pd.Series]:
    """Divisors of component effects by (site, layer), for "MLPs are just larger": patch norm and parameters.

    The patch norm is the mean length of treated - control activation at the last token, on discover.
    """
    subject, treatment = study.subject, "T2" if "T2" in study.treatments else study.treatments[0]
    chosen = [pair for pair in study.of(treatment) if pair.pair.split == "discover"]
    norms = dict.fromkeys(((one.site, one.layer) for one in estimands.mediators(subject, COMPONENTS)), 0.0)
    for group in estimands.batches(chosen, subject):
        batch = estimands.run_clean(subject, group)
        for site, layer in norms:
            change = batch.treated.site(site, layer) - batch.control.site(site, layer)
            norms[site, layer] += float(change[:, -1].double().norm(dim=-1).sum())
    counts = {
        (site, layer): float(sum(p.numel() for p in module.parameters()))
        for layer, parts in enumerate(subject.layers)
        for site, module in (("attn_out", parts.attn), ("mlp_out", parts.mlp))
    }
    found = {
        "per patch norm": {cell: total / max(len(chosen), 1) for cell, total in norms.items()},
        "per parameter": counts,
    }
    return {
        name: pd.Series(values.values(), index=pd.MultiIndex.from_tuples(values, names=["site", "layer"]), dtype=float)
        for name, values in found.items()
    }
