"""Effect tables whose shares, centroids and intervals are known: every pair's effects are multiples of given numbers."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from companion.base.thresholds import COMPONENTS
from companion.mediation.estimands import with_estimands

N_LAYERS = 6
LATE_MLP = {("mlp_out", 5): 3.0, ("attn_out", 4): 1.0, ("mlp_out", 0): 0.6, ("attn_out", 1): 0.4}


def effect_table(
    cells: Mapping[tuple[str, int], float | tuple[float, float]] | None = None,
    *,
    treatment: str = "T2",
    te: float = 4.0,
    start: float = -2.0,
    outcome: str = "Y1",
    n_topics: int = 50,
    n_pairs: int = 2,
    spread: float = 0.3,
    noise: float = 0.0,
    sites: tuple[str, ...] = ("attn_out", "mlp_out"),
    n_layers: int = N_LAYERS,
    topics: str = "topic",
    seed: int = 0,
) -> pd.DataFrame:
    """One row a pair and cell of all sites and layers; a cell not named has no effect.

    `cells` maps (site, layer) to NIE0 = NIE1 or to the two. All effects of a topic are multiplied by one number around 1
    (`spread`), so that shares are the same in every topic; `noise` is added to every effect on its own.
    """
    cells = LATE_MLP if cells is None else cells
    rng = np.random.default_rng(seed)
    name = treatment.removesuffix("-T2b")  # a difference belongs to its T2 pair
    rows = []
    for topic in range(n_topics):
        split = "discover" if topic < 0.4 * n_topics else "validate" if topic < 0.7 * n_topics else "test"
        for k in range(n_pairs):
            scale = 1 + spread * rng.uniform(-1, 1)
            for site in sites:
                for layer in range(n_layers):
                    nie = np.broadcast_to(cells.get((site, layer), 0.0), 2) * scale + noise * rng.standard_normal(2)
                    y11 = start + te * scale
                    y = (start, start + nie[0], y11 - nie[1], y11)
                    rows.append((f"{name}-{topic}.{k}", f"{topics} {topic}", split, site, layer, *y))
    names = ["pair_id", "topic", "split", "site", "layer", "y00", "y01", "y10", "y11"]
    table = pd.DataFrame(rows, columns=names)
    return with_estimands(table.assign(treatment=treatment, outcome=outcome, head=-1, position="last"))


def direct_table(cells: Mapping[tuple[str, int], float] | None = None, **settings: object) -> pd.DataFrame:
    """The same for the direct effects of the frozen-norm contrast."""
    table = effect_table(cells, outcome="contrast.frozen", **settings)  # type: ignore[arg-type]
    return table.assign(site=table.site + ".direct")


def benign_tables(n: int = 6, cells: Mapping[tuple[str, int], float] | None = None, **settings: object) -> pd.DataFrame:
    """Benign behaviours B1, B2, ... on topics of their own, by default in the middle of the network."""
    cells = {("mlp_out", 2): 2.0, ("attn_out", 3): 2.0} if cells is None else cells
    parts = [
        effect_table(cells, treatment=f"B{i + 1}", topics="benign", seed=i + 1, **settings)  # type: ignore[arg-type]
        for i in range(n)
    ]
    return pd.concat(parts, ignore_index=True)


def complete(
    cells: Mapping[tuple[str, int], float] | None = None, treatment: str = "T2", **settings: object
) -> pd.DataFrame:
    """T2 (or the contrast, with T2 beside it) under all three outcomes, and six benign behaviours."""
    names = ("T2", "T2-T2b") if treatment == "T2-T2b" else ("T2",)
    outcomes = ("Y1", "Y1.frozen", "Y2")
    harm = [effect_table(cells, treatment=name, outcome=out, **settings) for name in names for out in outcomes]  # type: ignore[arg-type]
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
    index = pd.MultiIndex.from_product([COMPONENTS, range(N_LAYERS)], names=["site", "layer"])
    is_mlp = index.get_level_values(0) == "mlp_out"
    return {
        name: pd.Series(np.where(is_mlp, size, 1.0), index)
        for name, size in (("per patch norm", 2), ("per parameter", 9))
    }
