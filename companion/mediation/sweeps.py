"""The sweeps over a prompt set, one batch at a time, so that several machines can share the batches.

The tables of all batches, put behind each other, are the whole. Which pairs share a batch is a pure function of the pairs and
of shapes. A shared sweep keeps each batch as a part on disk, in a folder named by everything that its numbers rest on; a part
that is missing, torn or of another sweep is measured again.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from companion.base import files, paths
from companion.base.device import to_host
from companion.base.display import progress
from companion.base.thresholds import COMPONENTS, deepest_early_layer
from companion.mediation import estimands, outcomes
from companion.mediation.mechanisms import earliest_layers
from companion.mediation.study import Study
from companion.model import memory
from companion.prompts import positions
from companion.prompts.tokens import TokenPair

DIRECT_SITES = tuple(f"{site}.direct" for site in COMPONENTS)
Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Sweep:
    """What is measured of a batch (tables by name), and on which treatments (all, where the study has none of them)."""

    measure: Callable[[Study, Sequence[TokenPair]], Tables]
    treatments: tuple[str, ...] = ()


def run_sweep(study: Study, name: str) -> Tables:
    """The whole sweep: parts that shards left are read, other batches measured, and kept if the run has a folder for parts."""
    kept = (paths.RESULTS / paths.check_slug(study.slug) / paths.PARTS).is_dir()
    groups, folder = sweep_batches(study, name), part_folder(study, name) if kept else None
    found = [_part(study, name, group, i, folder) for i, group in enumerate(progress(groups, desc=name))]
    return {table: pd.concat([one[table] for one in found], ignore_index=True) for table in found[0]}


def run_shard(study: Study, name: str, shard: int, n_shards: int) -> tuple[int, int]:
    """Measure every `n_shards`-th batch from batch `shard` on, and keep each as a part; returns (measured, found)."""
    groups, folder = sweep_batches(study, name), part_folder(study, name)
    own = range(shard, len(groups), n_shards)
    missing = [i for i in own if read_part(folder, i) is None]
    for i in progress(missing, desc=f"{name}, shard {shard + 1} of {n_shards}"):
        _part(study, name, groups[i], i, folder)
    return len(missing), len(own) - len(missing)


def _part(study: Study, name: str, group: Sequence[TokenPair], batch: int, folder: Path | None) -> Tables:
    """A batch's tables: read if its part is there and whole, else measured and, if parts are kept, written."""
    found = read_part(folder, batch) if folder else None
    if found is None:
        before = len(memory.events)
        found = SWEEPS[name].measure(study, group)
        if folder:
            write_part(found, folder, batch, memory.events[before:])
    return found


def sweep_batches(study: Study, name: str) -> list[list[TokenPair]]:
    """The batches of a sweep over `Study.judged`, in the order of its tables."""
    judged = study.judged
    return estimands.batches(judged.of(*SWEEPS[name].treatments) or judged.pairs, study.subject)


# ---- parts on disk ----


def part_folder(study: Study, name: str) -> Path:
    """The folder of a sweep's parts; its name changes with anything that the numbers rest on."""
    subject = study.subject
    config = {key: repr(value) for key, value in subject.model.config.to_dict().items() if key[0] != "_"}
    kind = [str(subject.dtype), subject.device.type, subject.model.config._attn_implementation]
    arrays = ("control", "treated", "control_offsets", "treated_offsets")
    pairs = [repr((p.pair, *(getattr(p, array).tolist() for array in arrays))) for p in study.pairs]
    openers, header = (
        {treatment: asdict(one) for treatment, one in study.openers.items()},
        estimands.user_header(subject),
    )
    code = [files.hash_folder(folder, {}, "*.py") for folder in paths.CODE]
    lock = files.hash_file(paths.ROOT / "requirements.lock", {})
    key = files.digest(name, subject.sha256, config, kind, header, pairs, openers, code, lock)[:32]
    return paths.RESULTS / paths.check_slug(study.slug) / paths.PARTS / key


def write_part(tables: Tables, folder: Path, batch: int, events: Sequence[str] = ()) -> Path:
    """Write the tables of a batch as one file; `events` are chunks that had to be halved for want of memory."""
    path = folder / f"{batch:05d}.zip"
    stamp = json.dumps({"key": folder.name, "batch": batch, "events": list(events)}).encode()
    content = {name: table.to_parquet(index=False, compression="zstd") for name, table in tables.items()}
    with files.replacing(path) as scratch, zipfile.ZipFile(scratch, "w") as whole:
        for name, data in {"stamp": stamp, **content}.items():
            whole.writestr(zipfile.ZipInfo(name), data)  # ZipInfo: without the time of day, so that bytes repeat
    return path


def read_part(folder: Path, batch: int) -> Tables | None:
    """The tables of a batch, or None if its part is not there, is not whole, or was made for another place."""
    try:
        with zipfile.ZipFile(folder / f"{batch:05d}.zip") as whole:
            content = {name: whole.read(name) for name in whole.namelist()}
        stamp = json.loads(content.pop("stamp"))
        tables = {name: pd.read_parquet(io.BytesIO(data)) for name, data in content.items()}
        is_own = (stamp["key"], stamp["batch"]) == (folder.name, batch)
    except Exception:  # no such file; and bytes that changed fail anywhere: in zip's checksums, in pyarrow, in pandas
        return None
    if is_own:
        memory.events.extend(stamp["events"])
    return tables if is_own else None


# ---- what is measured ----


def clean_rows(study: Study, batch: estimands.Batch) -> pd.DataFrame:
    """One row a pair: Y1 of both clean runs, TE, the smaller `joint` probability of the openers, and the light cone.

    `earliest` as in `earliest_layers`; `distance` the tokens from the last difference to the last token.
    """
    openers = study.openers[batch.pairs[0].pair.treatment]
    final = [run.resid_post[-1][:, -1] for run in (batch.control, batch.treated)]
    y00, y11 = (to_host(outcomes.log_odds(study.subject, resid, openers)) for resid in final)
    camps = [outcomes.opener_probabilities(study.subject, resid, openers) for resid in final]
    joint = np.minimum(*(to_host(comply + refuse) for comply, refuse in camps))
    earliest, distance = earliest_layers(batch.control, batch.pairs), [positions.distance(one) for one in batch.pairs]
    table = pd.DataFrame(estimands.pair_columns(batch.pairs))
    return table.assign(y00=y00, y11=y11, te=y11 - y00, joint=joint, earliest=earliest, distance=distance)


def clean_outcomes(study: Study) -> pd.DataFrame:
    """The rows of `clean_rows` for all pairs of a study, those of T2 - T2b behind them where it has twins."""
    groups = progress(estimands.batches(study.pairs, study.subject), desc="clean runs")
    rows = [clean_rows(study, estimands.run_clean(study.subject, group)) for group in groups]
    return estimands.with_difference(pd.concat(rows, ignore_index=True), study.twins)


def layer_tables(study: Study, group: Sequence[TokenPair], *, direct: bool) -> Tables:
    """Attention and MLP outputs at the last token, and but for benign behaviours the residual stream.

    T1 has the residual stream also at shared tokens, after `Study.thinned_layers` and the deepest early one. Reading out costs
    most: with the final norm frozen only components of T2 and T2b are, and direct effects only in the linear contrast.
    """
    subject, treatment = study.subject, group[0].pair.treatment
    is_benign = treatment[0] == "B" and treatment != study.main_treatment
    parts, resid = estimands.mediators(subject, COMPONENTS), estimands.mediators(subject, ["resid_post"])
    asked = {"Y1": parts if is_benign else resid + parts}
    if treatment == "T1":
        layers = sorted({*study.thinned_layers, deepest_early_layer(subject.n_layers)})
        asked["Y1"] += estimands.mediators(subject, ["resid_post"], ["shared"], layers)
    if treatment in ("T2", "T2b", study.main_treatment):
        asked["Y1.frozen"] = parts
    if direct:
        asked["contrast.frozen"] = estimands.mediators(subject, DIRECT_SITES)
    batch = estimands.run_clean(subject, group)
    return {"effects": estimands.batch_effects(subject, batch, study.openers, asked), "clean": clean_rows(study, batch)}


def whole_answer_tables(study: Study, group: Sequence[TokenPair]) -> Tables:
    """Y2 of attention and MLP outputs at the last token of the prompt."""
    wanted = estimands.mediators(study.subject, COMPONENTS)
    return {"effects": estimands.whole_answer_effects(study.subject, group, study.openers, wanted)}


def module_tables(study: Study, group: Sequence[TokenPair]) -> Tables:
    """Direct effects of attention and MLP outputs, total and direct effects of heads, at the last token.

    Reading Y1 out costs most, so heads have it for total effects alone; their direct ones are in the linear contrast.
    """
    subject, batch = study.subject, estimands.run_clean(study.subject, group)
    written, heads, own = (estimands.mediators(subject, sites) for sites in (DIRECT_SITES, ["head"], ["head.direct"]))
    each = ({"Y1": written, "contrast.frozen": written}, {"Y1": heads}, {"contrast.frozen": own})
    tables = [estimands.batch_effects(subject, batch, study.openers, asked) for asked in each]
    return {"effects": pd.concat(tables, ignore_index=True)}


SWEEPS: Mapping[str, Sweep] = {
    "layers": Sweep(partial(layer_tables, direct=False)),
    "layers with direct effects": Sweep(partial(layer_tables, direct=True)),
    "whole answers": Sweep(whole_answer_tables, ("T2", "T2b")),
    "modules": Sweep(module_tables, ("T2", "T2b")),
}


def memory_plan(study: Study) -> dict[str, object]:
    """For `chunks.json`: what the longest batch's clean runs and sweep keep in memory, by shapes; chunks halved are `events`."""
    n_pos = max(len(pair.control) for pair in study.pairs)
    n_pairs = memory.pairs_at_once(study.subject, n_pos)
    need, at_once = memory.sweep_memory(study.subject, n_pairs, n_pos), memory.token_budget(study.subject, n_pos)
    made = {"longest_prompt": n_pos, "pairs_at_once": n_pairs, "tokens_at_once": at_once}
    return {**made, "megabytes": round((2 * need.clean_run + need.sweep) / 1e6), "events": list(memory.events)}
