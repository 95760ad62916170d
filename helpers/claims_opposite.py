"""For whoever believes the opposite of a claim: which analysis would show them right, and whether it could."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from helpers.calibration_rates import CORRECTED, Rates
from helpers.verdicts import Verdict

# By claim: the opposite, and the analysis that would show it.
OPPOSITE = {
    "C1": ("It arises early or in the middle, or no later than any other choice of the model.",
           "02, Components, Later than what? and Where is it computed?: an upper limit of the late share at 0.40 or less"),
    "C2": ("Attention blocks write it.",
           "03, Direct effects and Passing through is not writing: an MLP share of at most one half"),
    "C3": ("Early layers do not understand it, or nothing uses what they understand.",
           "02, Early context: psi0 near 0 on tokens that do not differ"),
    "C4": ("Attention, or nothing but the skip path, carries it on.",
           "05, What carries it on, for all pairs: MLPs carry at most 0.40"),
    "C5a": ("Many neurons share the work, or the last layer has none of it.",
            "04, Sets: k90 of a tenth of the neurons or more, or psi1 of the last MLP at most 0.15"),
    "C5b": ("They add what was decided before, and switch nothing.",
            "04, Gate or contributor: an index near 0 in every form that could show a gate"),
    "C5c": ("Every answer token decides anew.", "05, When must it be closed?: the first token keeps at most 0.40 of the effect"),
    "C6": ("Other layers, or any direction, defend as well, or harmless answers suffer.",
           "06, Early, middle or late, with the same budget, Random directions and The trial"),
    "C7": ("The order of neurons says nothing.",
           "04, Are related neurons adjacent?: Moran's I at most 0.05, as after a permutation"),
}  # fmt: skip


def table(verdicts: Sequence[Verdict], rates: Rates) -> pd.DataFrame:
    """A row a claim: the opposite, the analysis, and in how many built models of which the claim is false it said so.

    `shown` counts "contradicted" of the registered rule, `shown_corrected` of the corrected one; "" where nothing was measured.
    """
    rows = [
        (one.claim, *OPPOSITE[one.claim], _shown(rates, one.claim), _shown(rates, one.claim + CORRECTED), one.verdict)
        for one in verdicts
    ]
    return pd.DataFrame(rows, columns=["claim", "opposite", "analysis", "shown", "shown_corrected", "verdict"])


def _shown(rates: Rates, name: str) -> str:
    found = rates.get(name, {}).get("power_to_contradict")
    return "" if found is None else f"{found['hits']} of {found['n']}"
