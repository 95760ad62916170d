"""Parts of a sweep on disk: one for each batch, written whole or not at all, and only read if it is what it should be.

A part lies in a folder named by everything that its numbers rest on (weights, prompts, code, precision, kind of device)
and carries that name, its batch and a checksum of its content. One that is missing, torn, foreign or out of date is
measured again, never trusted.

Y2: mediation of the whole answer, teacher-forced, instead of its first token.

Only prompt cells are patched; the answer's own tokens see the patch through attention, as they would when generated.

The sweeps over a prompt set, one batch at a time, so that a machine may take any share of the batches.

A sweep gives tables for a batch; the tables of all batches, put behind each other in the order of the batches, are the
whole. Which pairs share a batch is a pure function of the pairs and of shapes, so who measured a batch does not show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.base import files, paths
from companion.base.display import progress
from companion.base.paths import PARTS
from companion.base.thresholds import COMPONENTS
from companion.mediation import estimands, outcomes, reachability
from companion.mediation.estimands import Mediator, prompt_tokens, tidy
from companion.mediation.study import Study
from companion.model import activations, memory, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.prompts import positions
from companion.prompts.tokens import Openers, TokenPair

STAMP = "part"


def parts_home(slug: str) -> Path:
    """Where a run's parts lie; the folder is there only if the run was sharded."""
    return paths.RESULTS / paths.check_slug(slug) / PARTS


def part_folder(study: Study, sweep: str) -> Path | None:
    """The folder of this sweep's parts, or None for a run that keeps none."""
    return parts_home(study.slug) / part_key(study, sweep) if parts_home(study.slug).is_dir() else None


def make_part_folder(study: Study, sweep: str) -> Path:
    """The same, made if it is not there."""
    folder = parts_home(study.slug) / part_key(study, sweep)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def part_key(study: Study, sweep: str) -> str:
    """A name that changes with anything that the numbers of a sweep rest on."""
    subject = study.subject
    config = {name: repr(value) for name, value in subject.model.config.to_dict().items() if name[0] != "_"}
    kind = [str(subject.dtype), subject.device.type, subject.model.config._attn_implementation]
    header = positions.user_header(subject.tokenizer) if subject.tokenizer is not None else ""
    pairs = [repr((p.pair, *(part.tolist() for part in _tokens(p)))) for p in study.pairs]
    openers = {name: asdict(one) for name, one in study.openers.items()}
    return files.digest(sweep, subject.sha256, config, kind, header, pairs, openers, _code())[:32]


def _tokens(pair: TokenPair) -> tuple[np.ndarray, ...]:
    return pair.control, pair.treated, pair.control_offsets, pair.treated_offsets


@cache
def _code() -> str:
    code = [files.hash_folder(folder, {}, "*.py") for folder in paths.CODE]
    return files.digest(code, files.hash_file(paths.ROOT / "requirements.lock", {}))


def measured_part(
    folder: Path | None, batch: int, group: Sequence[TokenPair], sweep: Sweep, study: Study
) -> Mapping[str, pd.DataFrame]:
    """A batch's tables: read if its part is there and whole, else measured and, if parts are kept, written."""
    found = None if folder is None else read_part(folder, batch, sweep.tables)
    if found is not None:
        return found
    before = len(memory.chunk_events())
    tables = sweep.measure(study, group)
    if folder is not None:
        events = list(memory.chunk_events()[before:])
        for name, table in tables.items():
            write_part(table, folder, batch, name, events)
    return tables


def write_part(table: pd.DataFrame, folder: Path, batch: int, name: str, events: Sequence[str] = ()) -> Path:
    """Write one table of a batch with its stamp; `events` are chunks that had to be halved for want of memory."""
    stamped = table.copy(deep=False)
    stamped.attrs = {STAMP: _stamp(folder, batch, name, table, list(events))}
    return files.write_table(stamped, _path(folder, batch, name))


def read_part(folder: Path, batch: int, names: Sequence[str]) -> dict[str, pd.DataFrame] | None:
    """The tables of a batch, or None unless all of them are there, whole and made for this place."""
    found: dict[str, pd.DataFrame] = {}
    events: list[str] = []
    for name in names:
        part = _whole(folder, batch, name)
        if part is None:
            return None
        found[name], events = part
    memory.note_events(events)
    return found


def _stamp(folder: Path, batch: int, name: str, table: pd.DataFrame, events: list[str]) -> dict[str, Any]:
    whole = files.digest(part_content(table), events)
    return {"key": folder.name, "batch": batch, "table": name, "events": events, "content": whole}


def _whole(folder: Path, batch: int, name: str) -> tuple[pd.DataFrame, list[str]] | None:
    """A table and its events; None if it is not there, or not as it was written: it is then measured again."""
    path = _path(folder, batch, name)
    if not path.is_file():
        return None
    try:
        table = pd.read_parquet(path)
        stamp = table.attrs.pop(STAMP)
        is_whole = stamp == _stamp(folder, batch, name, table, stamp["events"])
    except Exception:  # bytes that changed fail anywhere: in pyarrow, in pandas, in the checksum of what was read
        return None
    return (table.reset_index(drop=True), stamp["events"]) if is_whole else None


def part_content(table: pd.DataFrame) -> str:
    """Checksum of a table's names, kinds and values.

    >>> one = pd.DataFrame({"a": [1.0, 2.0]})
    >>> content(one) == content(one.copy()) != content(one.assign(a=[1.0, 2.5]))
    True
    """
    digest = hashlib.sha256(repr([(name, str(kind)) for name, kind in table.dtypes.items()]).encode())
    digest.update(pd.util.hash_pandas_object(table, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _path(folder: Path, batch: int, name: str) -> Path:
    return folder / f"{batch:05d}.{name}.parquet"


def whole_answer_effects(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], wanted: Sequence[Mediator]
) -> pd.DataFrame:
    """The tidy table of `estimands.measure_effects` for Y2 = log p(answer) - log p(refusal), in nats.

    Answer and refusal are the model's own (`outcomes.continuations`), the same words for all four cells of a pair.
    Meant for pairs that share their request (T2, T2b): otherwise an answer to one prompt is off-topic for the other.
    """
    groups = progress(estimands.batches(pairs, subject), desc="full responses")
    return pd.concat([whole_answer_batch(subject, group, openers, wanted) for group in groups], ignore_index=True)


def whole_answer_batch(
    subject: Subject, group: Sequence[TokenPair], openers: Mapping[str, Openers], wanted: Sequence[Mediator]
) -> pd.DataFrame:
    """The rows of one batch: pairs of one treatment and one length."""
    header = positions.user_header(subject.tokenizer) if subject.tokenizer is not None else ""
    cells = _cells(subject, group, openers[group[0].pair.treatment], wanted, header)
    return estimands.estimands(tidy(group, wanted, "Y2", cells))


def _cells(
    subject: Subject, group: Sequence[TokenPair], openers: Openers, wanted: Sequence[Mediator], header: str
) -> dict[str, Float[np.ndarray, "pair mediator"]]:
    control, treated = prompt_tokens(subject, group)
    texts = outcomes.continuations(subject, control, treated, openers)
    answer = _log_probs(subject, group, (control, treated), (texts.answer, texts.answer_mask), wanted, header)
    refusal = _log_probs(subject, group, (control, treated), (texts.refusal, texts.refusal_mask), wanted, header)
    return {cell: answer[cell] - refusal[cell] for cell in answer}


def _log_probs(
    subject: Subject,
    group: Sequence[TokenPair],
    prompts: tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]],
    text: tuple[Int[Tensor, "pair step"], Bool[Tensor, "pair step"]],
    wanted: Sequence[Mediator],
    header: str,
) -> dict[str, Float[np.ndarray, "pair mediator"]]:
    """log p of one continuation in all four cells."""
    tokens, mask = text
    n_prompt, n_steps = prompts[0].shape[1], tokens.shape[1]
    runs = [activations.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1)) for prompt in prompts]
    read = range(n_prompt - 1, n_prompt - 1 + n_steps)
    clean = [outcomes.sequence_log_prob(subject, run.resid_post[-1][:, list(read)], tokens, mask) for run in runs]
    made = _patches(group, wanted, header, runs[0])
    patched = []
    for base, source in (runs, runs[::-1]):
        resid = replay.interchange(subject, base, source, made, read=tuple(read))
        # One mediator at a time: the full vocabulary at every step is the largest array of the whole companion.
        scores = [
            outcomes.sequence_log_prob(subject, resid[:, i], tokens, mask).cpu().numpy() for i in range(len(made))
        ]
        patched.append(np.stack(scores, axis=1))
    shape = patched[0].shape
    y00, y11 = (np.broadcast_to(score.cpu().numpy()[:, None], shape) for score in clean)
    return {"y00": y00, "y01": patched[0], "y10": patched[1], "y11": y11}


def _patches(group: Sequence[TokenPair], wanted: Sequence[Mediator], header: str, run: CleanRun) -> list[Patch]:
    """Interventions on the prompt's cells of a sequence that goes on behind it."""
    n_all = run.tokens.shape[1]
    made = []
    for mediator in wanted:
        mask = np.zeros((len(group), n_all), dtype=bool)
        stacked = positions.stack(group, header, mediator.position)
        mask[:, : stacked.shape[1]] = stacked
        head = None if mediator.head < 0 else mediator.head
        made.append(Patch(mediator.site, mediator.layer, torch.tensor(mask, device=run.tokens.device), head))
    return made


LAYER_SITES = ("resid_post", *COMPONENTS)


DIRECT_SITES = tuple(f"{site}.direct" for site in COMPONENTS)


CLEAN = ["pair_id", "topic", "treatment", "split", "y00", "y11", "te", "joint", "earliest", "distance"]


Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Sweep:
    """What is measured of a batch (`tables` by name), and on which treatments (empty: on all)."""

    measure: Callable[[Study, Sequence[TokenPair]], Tables]
    tables: tuple[str, ...]
    treatments: tuple[str, ...] = ()


def batches(study: Study, name: str) -> list[list[TokenPair]]:
    """The batches of a sweep, in the order of its tables."""
    treatments = SWEEPS[name].treatments
    return estimands.batches(study.of(*treatments) if treatments else study.pairs, study.subject)


def run_sweep(study: Study, name: str) -> Tables:
    """The whole sweep: parts that shards of this run have left are read, other batches are measured here."""
    sweep, groups = SWEEPS[name], batches(study, name)
    place = part_folder(study, name)
    found = [measured_part(place, i, group, sweep, study) for i, group in enumerate(progress(groups, desc=name))]
    return {table: pd.concat([one[table] for one in found], ignore_index=True) for table in sweep.tables}


def run_shard(study: Study, name: str, shard: int, n_shards: int) -> tuple[int, int]:
    """Measure every `n_shards`-th batch from batch `shard` on, and keep each as a part; returns (measured, found)."""
    sweep, groups = SWEEPS[name], batches(study, name)
    place = make_part_folder(study, name)
    own = range(shard, len(groups), n_shards)
    missing = [i for i in own if read_part(place, i, sweep.tables) is None]
    for i in progress(missing, desc=f"{name}, shard {shard + 1} of {n_shards}"):
        measured_part(place, i, groups[i], sweep, study)
    return len(missing), len(own) - len(missing)


def clean_rows(study: Study, batch: estimands.Batch) -> pd.DataFrame:
    """One row a pair: Y1 of both clean runs, TE, joint probability of the openers, and the light cone.

    `joint` is the smaller of the two prompts' p(comply) + p(refuse); `earliest` the first layer whose residual stream
    at the last token can differ (the number of layers where none can); `distance` the tokens from the last difference
    to the last token.
    """
    openers = study.openers[batch.pairs[0].pair.treatment]
    final = [run.resid_post[-1][:, -1] for run in (batch.control, batch.treated)]
    y00, y11 = (outcomes.log_odds(study.subject, resid, openers).tolist() for resid in final)
    camps = [outcomes.opener_probabilities(study.subject, resid, openers) for resid in final]
    joint = np.minimum(*((comply + refuse).cpu().numpy() for comply, refuse in camps))
    earliest = reachability.earliest_layers(batch.control, batch.pairs)
    rows: list[tuple[object, ...]] = []
    for i, token_pair in enumerate(batch.pairs):
        pair = token_pair.pair
        layer = study.subject.n_layers if earliest[i] is None else earliest[i]
        values = (y00[i], y11[i], y11[i] - y00[i], float(joint[i]), layer, positions.distance(token_pair))
        rows.append((pair.id, pair.topic, pair.treatment, pair.split, *values))
    return pd.DataFrame(rows, columns=CLEAN)


def _layers(study: Study, group: Sequence[TokenPair], *, direct: bool) -> Tables:
    """Residual stream, attention and MLP outputs at the last token; for T1 the residual stream also at shared tokens."""
    subject, seen = study.subject, []
    wanted = estimands.mediators(subject, (*LAYER_SITES, *(DIRECT_SITES if direct else ())))
    if group[0].pair.treatment == "T1":
        wanted += estimands.mediators(subject, ["resid_post"], ["shared"])
    names = ("Y1", "Y1.frozen", *(("contrast.frozen",) if direct else ()))
    table = estimands.batch_effects(
        subject, group, study.openers, wanted, names, watch=lambda batch: seen.append(clean_rows(study, batch))
    )
    return {"effects": table, "clean": seen[0]}


def _plain_layers(study: Study, group: Sequence[TokenPair]) -> Tables:
    return _layers(study, group, direct=False)


def _direct_layers(study: Study, group: Sequence[TokenPair]) -> Tables:
    return _layers(study, group, direct=True)


def _whole_answers(study: Study, group: Sequence[TokenPair]) -> Tables:
    wanted = estimands.mediators(study.subject, LAYER_SITES)
    return {"effects": whole_answer_batch(study.subject, group, study.openers, wanted)}


def _modules(study: Study, group: Sequence[TokenPair]) -> Tables:
    """Direct effects of attention and MLP outputs, total and direct effects of heads, at the last token."""
    wanted = estimands.mediators(study.subject, [*DIRECT_SITES, "head", "head.direct"])
    names = ("Y1", "contrast.frozen")
    return {"effects": estimands.batch_effects(study.subject, group, study.openers, wanted, names)}


SWEEPS: Mapping[str, Sweep] = {
    "layers": Sweep(_plain_layers, ("effects", "clean")),
    "layers with direct effects": Sweep(_direct_layers, ("effects", "clean")),
    "whole answers": Sweep(_whole_answers, ("effects",), ("T2", "T2b")),
    "modules": Sweep(_modules, ("effects",)),
}


def clean_outcomes(study: Study) -> pd.DataFrame:
    """One row a pair: Y1 of both clean runs, TE, joint probability of the openers, and the light cone.

    The columns are those of `sweeps.clean_rows`.
    """
    groups = progress(estimands.batches(study.pairs, study.subject), desc="clean runs")
    rows = [clean_rows(study, estimands.run_clean(study.subject, group)) for group in groups]
    return pd.concat(rows, ignore_index=True)


def module_effects(study: Study) -> pd.DataFrame:
    """Direct effects of attention and MLP outputs, total and direct effects of heads, at the last token."""
    return run_sweep(study, "modules")["effects"]


def memory_plan(study: Study) -> dict[str, object]:
    """What the sweeps keep in memory above the model, estimated from shapes, and how the work is cut; for `chunks.json`.

    Megabytes are for both clean runs of the longest batch and the sweep on it; `events` are chunks that had to be
    halved for want of memory.
    """
    n_pos = max(len(pair.control) for pair in study.pairs)
    n_pairs = memory.pairs_at_once(study.subject, n_pos)
    need = memory.sweep_memory(study.subject, n_pairs, n_pos)
    return {
        "longest_prompt": n_pos,
        "pairs_at_once": n_pairs,
        "tokens_at_once": memory.token_budget(study.subject, n_pos),
        "megabytes": round((2 * need.clean_run + need.sweep) / 1e6),
        "events": list(memory.chunk_events()),
    }
