"""What a figure of the companion is: the table it is drawn from, what draws it, and what it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

ESTIMATE = dict.fromkeys(("estimate", "low", "high"), "float")
BY_LAYER = {"layer": "int", **ESTIMATE}
LOG_ODDS = "effect (log-odds)"


@dataclass(frozen=True)
class FigureSpec:
    """One figure: its name (also of its CSV), what draws it, the claim it bears on, what it shows, its columns."""

    name: str
    draw: Callable[[pd.DataFrame], Figure]
    claim: str
    shows: str
    columns: dict[str, str]
