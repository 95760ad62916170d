"""How much wider intervals become where the words of a prompt set are a sample as its topics are.

Here topics and wrapper families (T2 - T2b), or topics and verbs (T1), are drawn together for the key numbers of C1 to C4. No
rule reads it: it says how far a verdict is one on these wrappers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from companion.base.display import NotDefined
from companion.base.files import EFFECTS, read_table
from companion.base.thresholds import COMPUTED, MLP_SHARE_WITH_OWN
from companion.evidence.layers import PSI
from companion.mediation import mechanisms, summaries
from companion.mediation.mechanisms import HELD, WITH_OWN
from companion.mediation.summaries import late_share, mlp_share, primary, signed, signed_contrast
from companion.prompts.pairs import Pair
from companion.stats import bootstrap, clusters
from companion.stats.bootstrap import Quantity

FILES = {  # in a run's folder
    "layers": "02_layers.parquet", "computed": "02_computed.parquet", "modules": "03_modules.parquet",
    "carried": "05_carried.parquet",
}  # fmt: skip


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
            found[pair.id] = re.sub(r"(?<=.)-\d+$", "", pair.family)
    return {name: level for name, level in found.items() if level}


def read_effects(folder: Path) -> dict[str, pd.DataFrame]:
    """The pair-level tables of a run that `two_way_table` can use, as far as the run left them (`FILES`)."""
    return {name: read_table(folder / file, EFFECTS) for name, file in FILES.items() if (folder / file).is_file()}


def two_way_table(tables: Mapping[str, pd.DataFrame], pairs: Iterable[Pair]) -> pd.DataFrame | NotDefined:
    """Key numbers of C1 to C4 with their interval over topics, and that over topics and wrapper families, or verbs.

    `tables` are pair-level effects by name, whichever of `FILES` a run has; `wider` is the ratio of the widths. A number whose
    pairs share one family or verb has no row; NotDefined where none has a row.
    """
    level, rows = second_level(pairs), []
    for claim, quantity, name, asked in KEY_NUMBERS:
        share = asked(tables[name]) if name in tables and len(tables[name]) else None
        if share is None:
            continue
        table = share.table.assign(level=share.table.pair_id.map(level)).dropna(subset="level")
        n_topics, n_levels = table.topic.nunique(), table.level.nunique()
        if min(n_topics, n_levels) < 2:
            continue
        one = replace(share, table=table).estimates()
        cells = table.assign(topic=list(zip(table.topic, table.level, strict=True)))
        sums = clusters.cluster_sums(cells, share.values, by=share.by)
        topics, levels = (np.array(names) for names in zip(*sums.clusters, strict=True))
        both = bootstrap.two_way(sums, share.statistic, topics, levels)
        ends = [float(x[0]) for x in (one.estimate, one.low, one.high, both.low, both.high)]
        factor = "verbs" if table.treatment.iloc[0] == "T1" else "wrapper families"
        wider = (ends[4] - ends[3]) / (ends[2] - ends[1]) if ends[2] > ends[1] else np.nan
        rows.append((claim, quantity, factor, n_topics, n_levels, *ends, wider))
    if not rows:
        return NotDefined("Two samples need pairs of at least two wrapper families, or of two verbs.")
    columns = ["claim", "quantity", "drawn with topics", "topics", "levels", "estimate", "low", "high", "low both"]
    return pd.DataFrame(rows, columns=[*columns, "high both", "wider"])


def _carried(table: pd.DataFrame) -> Quantity | None:
    treatment = summaries.primary(table)
    hand_over = mechanisms.hand_over_layer(table, treatment, "discover")
    if hand_over.empty:
        return None
    effects = signed_contrast(table, treatment, list(HELD), split=None)
    return mechanisms.path_shares(effects, int(hand_over.layer.iloc[0]), paths=WITH_OWN)


# Claim, key number, the table that it is computed from, and how.
KEY_NUMBERS: tuple[tuple[str, str, str, Callable[[pd.DataFrame], Quantity | None]], ...] = (
    ("C1", "late share", "layers", lambda table: late_share(signed_contrast(table, split=None), table.layer.max() + 1)),
    ("C1", COMPUTED, "computed", lambda table: late_share(signed(table), table.layer.max() + 1)),
    ("C2", "MLP share of direct effects", "modules", lambda table: mlp_share(summaries.written(table, primary(table)))),
    ("C3", PSI, "layers", lambda table: summaries.psi0(summaries.early_shared(table, table.layer.max() + 1))),
    ("C4", MLP_SHARE_WITH_OWN, "carried", _carried),
)
