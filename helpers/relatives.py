"""What a model is compared with: its untrained twin, other seeds, and the same training with other attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from helpers import paths, thinning
from helpers.controls import UNTRAINED
from helpers.study import Study
from helpers.subject import load, untrained_twin

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
    kept = {pair.id for pair in thinning.limit([token_pair.pair for token_pair in study.pairs], n)}
    return replace(study, pairs=tuple(pair for pair in study.pairs if pair.pair.id in kept))


def family(study: Study, model: str, profile: str) -> Iterator[tuple[str, Study]]:
    """What a model is compared with: its untrained twin and, for a shipped model, its relatives and their twins.

    A twin has the same architecture and fresh random weights. The smoke profile has the model's own twin only.
    Comparisons use at most 120 pairs a treatment (in the default set: one for each topic).
    """
    study = thinned(study, RELATIVE_PAIRS)
    yield study.slug + UNTRAINED, replace(study, subject=untrained_twin(study.subject))
    for seed, name in enumerate(relatives(model) if profile == "full" else (), start=1):
        subject = load(name, device=str(study.subject.device), dtype="float32")
        yield name, replace(study, subject=subject)
        yield name + UNTRAINED, replace(study, subject=untrained_twin(subject, seed))
