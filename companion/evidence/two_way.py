"""How much wider intervals become where the words of a prompt set are a sample as its topics are.

Every interval of this project draws topics. But a few families of wrappers recur on every topic, and verbs recur among the
requests. Here topics and wrapper families (T2 - T2b), or topics and verbs (T1), are drawn together for the key numbers of C1 to
C4. No rule reads it: it says how far a verdict is one on these wrappers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from companion.base.display import NotDefined
from companion.base.files import EFFECTS, read_table
from companion.base.thresholds import COMPONENTS, COMPUTED, LATE, MLP_SHARE_WITH_OWN, deepest_early_layer, depth
from companion.mediation import mechanisms, summaries
from companion.mediation.mechanisms import HELD, WITH_OWN
from companion.mediation.summaries import VARIANTS, Variant
from companion.prompts.pairs import Pair
from companion.stats import bootstrap, clusters
from companion.stats.clusters import Statistic

FILES = {  # in a run's folder
    "layers": "02_layers.parquet", "computed": "02_computed.parquet", "modules": "03_modules.parquet",
    "carried": "05_carried.parquet",
}  # fmt: skip
PSI = "psi0 early, shared tokens"
COLUMNS = ("claim", "quantity", "drawn with topics", "topics", "levels", "estimate", "low", "high", "low both", "high both",
           "wider")  # fmt: skip
# Signed effects whose sums per topic a statistic takes: the test pairs, their value columns and cells, and the statistic, which
# is made once the order of the cells is known.
Asked = tuple[pd.DataFrame, list[str], list[str], Callable[[pd.DataFrame], Statistic]]


def second_level(pairs: Iterable[Pair]) -> dict[str, str]:
    """For each pair of T1 its verb, of T2 and T2b its family of wrappers (without the tier that the invented language has).

    Pairs without a marked verb, or without a named family, are left out.
    """
    found = {}
    for pair in pairs:
        if pair.treatment == "T1":
            start, end = pair.spans.get("treated", {}).get("verb", (0, 0))
            found[pair.id] = pair.treated[start:end]
        elif pair.treatment in ("T2", "T2b"):
            frame, _, tier = pair.family.rpartition("-")
            found[pair.id] = frame if frame and tier.isdigit() else pair.family
    return {name: level for name, level in found.items() if level}


def read_effects(folder: Path) -> dict[str, pd.DataFrame]:
    """The pair-level tables of a run that `two_way_table` can use, as far as the run left them (`FILES`)."""
    found = {name: folder / file for name, file in FILES.items()}
    return {name: read_table(path, EFFECTS) for name, path in found.items() if path.is_file()}


def two_way_table(tables: Mapping[str, pd.DataFrame], pairs: Iterable[Pair]) -> pd.DataFrame | NotDefined:
    """Key numbers of C1 to C4 with their interval over topics, and that over topics and wrapper families, or verbs.

    `tables` are pair-level effects by name, whichever a run has: those of `FILES`, of which "computed" is made by
    `mechanisms.interaction_effects` and "carried" by `mechanisms.path_effects`. Columns `COLUMNS`; `wider` is the ratio of the
    widths. A number whose pairs share one family or verb has no row; NotDefined where none has a row.
    """
    level, rows = second_level(pairs), []
    for claim, quantity, name, asked in KEY_NUMBERS:
        found = asked(tables[name]) if name in tables and len(tables[name]) else None
        if found is None:
            continue
        table, values, by, make = found
        table = table.assign(level=table.pair_id.map(level)).dropna(subset="level")
        if table.level.nunique() < 2 or table.topic.nunique() < 2:
            continue
        topics = clusters.cluster_sums(table, values, by=by)
        one = bootstrap.bootstrap(topics, make(topics.columns))
        cells = clusters.cluster_sums(
            table.assign(topic=list(zip(table.topic, table.level, strict=True))), values, by=by
        )
        first, second = (np.array([cell[i] for cell in cells.clusters]) for i in (0, 1))
        both = bootstrap.two_way(cells, make(cells.columns), first, second)
        ends = [float(x[0]) for x in (one.estimate, one.low, one.high, both.low, both.high)]
        factor = "verbs" if table.treatment.iloc[0] == "T1" else "wrapper families"
        wider = (ends[4] - ends[3]) / (ends[2] - ends[1]) if ends[2] > ends[1] else np.nan
        rows.append((claim, quantity, factor, table.topic.nunique(), table.level.nunique(), *ends, wider))
    if not rows:
        return NotDefined("Two samples need pairs of at least two wrapper families, or of two verbs.")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _share(effects: pd.DataFrame, numerator: Callable[[pd.DataFrame], np.ndarray]) -> Asked | None:
    """A share of positive effects as in `summaries.share`: cells are chosen on discover, summed on test."""
    if not summaries.enough(effects):
        return None
    discover = effects[effects.split == "discover"]

    def make(columns: pd.DataFrame) -> Statistic:
        weight = summaries.positive_cells(discover, "nie", columns).astype(float)
        return clusters.ratio(weight * numerator(columns), weight)

    cells = effects[["site", "layer"]].drop_duplicates()
    if not summaries.positive_cells(discover, "nie", cells).any():
        return None
    return effects[effects.split == "test"], ["nie"], ["site", "layer"], make


def _computed(table: pd.DataFrame) -> Asked | None:
    n_layers = table.layer.max() + 1
    return _share(summaries.signed(table), lambda cells: depth(cells["layer"], n_layers) > LATE)


def _late(table: pd.DataFrame) -> Asked | None:
    return _computed(summaries.select(table, summaries.primary(table), VARIANTS[0]))


def _written(table: pd.DataFrame) -> Asked | None:
    sites = [f"{site}.direct" for site in COMPONENTS]
    direct = summaries.select(table, summaries.primary(table), Variant("", outcome="contrast.frozen"), sites)
    return _share(summaries.signed(direct), lambda cells: cells["site"].str.startswith("mlp_out").to_numpy())


def _early(table: pd.DataFrame) -> Asked | None:
    at = table[
        (table.treatment == "T1") & (table.position == "shared") & (table.outcome == "Y1") & (table.split == "test")
    ]
    at = at[at.layer == deepest_early_layer(int(table.layer.max()) + 1)]

    def make(columns: pd.DataFrame) -> Statistic:
        return clusters.ratio(*((columns["value"] == name).to_numpy() for name in ("nie0", "te")))

    return (at, ["nie0", "te"], [], make) if len(at) else None


def _carried(table: pd.DataFrame) -> Asked | None:
    treatment = summaries.primary(table)
    hand_over = mechanisms.hand_over_layer(table, treatment, "discover")
    if hand_over.empty:
        return None
    effects = summaries.signed(summaries.select(table, treatment, VARIANTS[0], list(HELD)))
    (path,) = WITH_OWN.values()

    def make(columns: pd.DataFrame) -> Statistic:
        carried = np.array([float(path.get(name, 0)) for name in columns["site"]])
        return clusters.ratio(carried, (columns["site"] == "live").to_numpy())

    at = effects[(effects.layer == hand_over.layer.iloc[0]) & (effects.split == "test")]
    return at, ["nie"], ["site"], make


# Claim, key number, the table that it is computed from, and how.
KEY_NUMBERS: tuple[tuple[str, str, str, Callable[[pd.DataFrame], Asked | None]], ...] = (
    ("C1", "late share", "layers", _late),
    ("C1", COMPUTED, "computed", _computed),
    ("C2", "MLP share of direct effects", "modules", _written),
    ("C3", PSI, "layers", _early),
    ("C4", MLP_SHARE_WITH_OWN, "carried", _carried),
)
