"""Effect tables whose shares, centroids and intervals are known: every pair's effects are multiples of given numbers."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd

from companion.base.thresholds import COMPONENTS
from companion.mediation.estimands import with_estimands

N_LAYERS = 6
LATE_MLP = {("mlp_out", 5): 3.0, ("attn_out", 4): 1.0, ("mlp_out", 0): 0.6, ("attn_out", 1): 0.4}


def effect_table(
    cells: Mapping[tuple[str, int], float | tuple[float, float]] = LATE_MLP, *, treatment: str = "T2", outcome: str = "Y1",
    te: float = 4.0, start: float = -2.0, spread: float = 0.3, noise: float = 0.0, seed: int = 0, topics: str = "topic",
    sites: tuple[str, ...] = COMPONENTS, n_layers: int = N_LAYERS,
) -> pd.DataFrame:  # fmt: skip
    """One row a pair and cell of all sites and layers, two pairs of each of 50 topics; a cell not named has no effect.

    `cells` maps (site, layer) to NIE0 = NIE1 or to the two. All effects of a topic are multiplied by one number around 1
    (`spread`), so that shares are the same in every topic; `noise` is added to every effect on its own.
    """
    rng, rows = np.random.default_rng(seed), []
    name = treatment.removesuffix("-T2b")  # a difference belongs to its T2 pair
    for topic, k in product(range(50), range(2)):
        split, scale = (
            "discover" if topic < 20 else "validate" if topic < 35 else "test",
            1 + spread * rng.uniform(-1, 1),
        )
        for site, layer in product(sites, range(n_layers)):
            nie = np.broadcast_to(cells.get((site, layer), 0.0), 2) * scale + noise * rng.standard_normal(2)
            y11 = start + te * scale
            y = (start, start + nie[0], y11 - nie[1], y11)
            rows.append((f"{name}-{topic}.{k}", f"{topics} {topic}", split, site, layer, *y))
    table = pd.DataFrame(rows, columns=["pair_id", "topic", "split", "site", "layer", "y00", "y01", "y10", "y11"])
    return with_estimands(table.assign(treatment=treatment, outcome=outcome, head=-1, position="last"))


def direct_table(cells: Mapping[tuple[str, int], float] = LATE_MLP, treatment: str = "T2") -> pd.DataFrame:
    """The same for the direct effects of the frozen-norm contrast."""
    table = effect_table(cells, outcome="contrast.frozen", treatment=treatment)
    return table.assign(site=table.site + ".direct")


MIDDLE = {("mlp_out", 2): 2.0, ("attn_out", 3): 2.0}


def benign_tables(n: int = 6, cells: Mapping[tuple[str, int], float] = MIDDLE, **settings: float) -> pd.DataFrame:
    """Benign behaviours B1, B2, ... on topics of their own, by default in the middle of the network."""
    named = [{"treatment": f"B{i}", "topics": "benign", "seed": i} for i in range(1, n + 1)]
    return pd.concat([effect_table(cells, **one, **settings) for one in named], ignore_index=True)


def complete(treatment: str = "T2") -> pd.DataFrame:
    """T2 (or the contrast, with T2 beside it) under all three outcomes, and six benign behaviours."""
    names, outcomes = ("T2", "T2-T2b") if treatment == "T2-T2b" else ("T2",), ("Y1", "Y1.frozen", "Y2")
    harm = [effect_table(treatment=name, outcome=out) for name in names for out in outcomes]
    return pd.concat([*harm, benign_tables()], ignore_index=True)


def find(rows: list[dict], quantity: str, variant: str = "main") -> dict:
    (found,) = [row for row in rows if row["quantity"] == quantity and row["variant"] == variant]
    return found


def shifted(table: pd.DataFrame, split: str, **changes: float) -> pd.DataFrame:
    """The table with some columns of one split multiplied."""
    made = table.copy()
    for name, factor in changes.items():
        made.loc[made.split == split, name] *= factor
    return made


def scales() -> dict[str, pd.Series]:
    """Divisors of cells: 1 for attention and a number of its own for an MLP."""
    index = pd.MultiIndex.from_product([COMPONENTS, range(N_LAYERS)], names=["site", "layer"])
    is_mlp = index.get_level_values(0) == "mlp_out"
    sizes = {"per patch norm": 2, "per parameter": 9}
    return {name: pd.Series(np.where(is_mlp, size, 1.0), index) for name, size in sizes.items()}
