"""One compiled model with a gate, and what the whole pipeline measures of it: made once for all tests of the calibration."""

from dataclasses import replace
from functools import cache

from companion.calibration import draws, localise
from companion.mediation.study import Study
from organisms import compiled
from organisms.compiled_design import draw_design

KEYS = ["model", "claim", "quantity", "variant"]
NUMBERS = ["estimate", "ci_low", "ci_high"]


@cache
def gated_organism() -> compiled.Organism:
    seed = next(seed for seed in range(20) if draw_design("gated", seed).n_layers == 6)
    return compiled.draw("gated", seed, topics=10, pairs_per_topic=1)


def few_pairs(organism: compiled.Organism) -> Study:
    """Its study with one benign behaviour only, to be quick."""
    this = compiled.study(organism)
    return replace(this, pairs=tuple(this.of("T1", "T2", "T2b", "B1")))


@cache
def measured_organism() -> localise.Measured:
    return draws.measure_study(few_pairs(gated_organism()), gated_organism().name)
