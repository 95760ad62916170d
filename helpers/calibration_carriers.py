"""C4 in closed form: what the last token's residual stream does if outputs above it are held, by a program's arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from helpers import carriers, mediation
from helpers.organisms import compiled_language as lang
from helpers.organisms.compiled_language import Planned
from helpers.organisms.compiled_program import Program
from helpers.organisms.compiled_truth import Side, readout, run, sides

PARTS = {"attn_out": "attn", "mlp_out": "mlp"}  # what a run's trace calls them


def table(program: Program, pairs: Sequence[Planned]) -> pd.DataFrame:
    """The rows of `carriers.effects` on Y1, with those of T2 - T2b behind them, for pairs of T2 and T2b."""
    made = [_treatment(program, [one for one in pairs if one.pair.treatment == name]) for name in ("T2", "T2b")]
    effects = mediation.estimands(pd.concat(made, ignore_index=True))
    twins = {one.pair.id: one.pair.twin for one in pairs if one.pair.twin}
    return pd.concat([effects, mediation.difference(effects, twins)], ignore_index=True)


def _treatment(program: Program, pairs: Sequence[Planned]) -> pd.DataFrame:
    camps, both = lang.outcomes()[pairs[0].pair.treatment], sides(program, pairs)
    y00, y11 = (readout(program, *camps, side.last.post[-1]) for side in both)
    fields = {"pair_id": "id", "topic": "topic", "treatment": "treatment", "split": "split"}
    meta = {name: [getattr(one.pair, field) for one in pairs] for name, field in fields.items()}
    tables = []
    for layer in range(program.n_layers):
        for name in carriers.HELD:
            y01, y10 = (readout(program, *camps, final(a, b, layer, name)) for a, b in (both, both[::-1]))
            cells = {"y00": y00, "y01": y01, "y10": y10, "y11": y11}
            place = {"site": name, "layer": layer, "position": "last", "head": -1, "outcome": "Y1"}
            tables.append(pd.DataFrame({**meta, **place, **cells}))
    return pd.concat(tables, ignore_index=True)


def final(base: Side, source: Side, layer: int, name: str) -> Float[np.ndarray, "prompt channel"]:
    """Final state of the last token with the source's state after a layer, and the base's outputs held by `carriers.HELD`."""
    clean, above = base.last, range(layer + 1, base.program.n_layers)
    do = {(site, at): getattr(clean, PARTS[site])[at] for site in carriers.HELD[name] for at in above}
    own = clean.mlp[layer] - source.last.mlp[layer] if name == "all held" else 0.0
    do[("resid_post", layer)] = source.last.post[layer] + own
    return run(base.program, base.found, "last", base.end.pre, do, clean).post[-1]
