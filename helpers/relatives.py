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
