"""From what was typed to what a run uses: its name, its device, and models, judges and prompt sets by name become folders.

A prompt set of public sets is made here for one model; its texts go to the user's cache and never into the repository. The
command line imports this module, so what is heavy is imported where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from companion.base import folders, hub, paths, smollm2
from companion.base.errors import InputError
from companion.base.files import read_json, write_json, write_text
from companion.base.folders import model_folder, names, prompts_folder
from companion.base.paths import PROMPTS, check_slug, relative
from companion.prompts import public
from companion.run import freshness, runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from companion.prompts.pairs import Pair
    from companion.prompts.public import Request, Wrapper

RESERVED = ("embedded", smollm2.NAME, *smollm2.refusers())  # runs whose results are in the repository
Made = TypeVar("Made")
LONGEST = 90  # characters of a name that nobody chose


def slug(found: Mapping[str, Any], name: str | None, judge: str | None, given: str | None) -> str:
    """The run's name; InputError for one that cannot be, or of a run with another model, prompts, wrappers (`given`) or judge."""
    chosen = check_slug(default_slug(found, judge, given) if name is None else name)
    if chosen in RESERVED and chosen != default_slug(found, judge, given):
        raise InputError(f"--name {chosen} is the run of that model, whose results are kept: choose another name")
    before = freshness.recall(paths.RESULTS / chosen, runner.MADE_FROM)
    for kind, now in made_from(found, judge, given).items():
        then = before.get(kind, now)
        # What is no longer where it was may be the same: a folder that was moved.
        is_moved = all(place and Path(place).is_absolute() for place in (then, now)) and not Path(str(then)).exists()
        if then != now and not is_moved:
            has, asked = (f"{kind} {place}" if place else f"no {kind}" for place in (then, now))
            made = f"the results of {chosen!r} were made with {has}, and now it would be {asked}"
            raise InputError(f"{made}: give this run a name of its own with --name")
    return chosen


def default_slug(found: Mapping[str, Any], judge: str | None = None, given: str | None = None) -> str:
    """The run's name if none is given: what differs from the default, and a hash in place of the end of a long one.

    >>> default_slug(runner.DEFAULTS)
    'smollm2-refuser'
    >>> default_slug({**runner.DEFAULTS, "MODEL": "window-1", "PROMPTS": "embedded", "PAIRS": 50})
    'window-1-pairs50'
    >>> default_slug({**runner.DEFAULTS, "PROMPTS": "xstest"}, given="my/own.jsonl")
    'smollm2-refuser-xstest-wrappers-own'
    >>> len(default_slug({**runner.DEFAULTS, "MODEL": f"org/{'long' * 50}"})) == LONGEST
    True
    """
    base, adapter = folders.split_adapter(found["MODEL"])
    parts = [hub.slug(base), *([f"adapter-{adapter.name}"] if adapter else [])]
    parts = [found["MODEL"]] if found["MODEL"] in smollm2.refusers() else parts
    if found["PROMPTS"] != ("english" if base == smollm2.NAME else "embedded"):
        parts.append(Path(found["PROMPTS"]).name)
    parts += [found[name] for name in ("DEVICE", "DTYPE", "PROFILE") if found[name] != runner.DEFAULTS[name]]
    parts += [f"pairs{found['PAIRS']}"] if found["PAIRS"] else []
    if given:
        place = folders.from_caller(given).resolve()
        parts.append(f"wrappers-{place.name if place.is_dir() else place.stem}")
    parts += [f"judge-{hub.slug(judge)}"] if judge else []
    whole = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).lstrip(".")
    end = f"-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return whole if len(whole) <= LONGEST else whole[: LONGEST - len(end)] + end


def made_from(found: Mapping[str, Any], judge: str | None, given: str | None) -> dict[str, str | None]:
    """What a run is asked to study: its model, prompts, wrappers and judge, by name or by the place where each lies.

    Of a model of the hub its repository: another revision is the same model changed, as is a folder whose files changed.
    """
    prompts = found["PROMPTS"]
    sets = public.parse(prompts) if is_public_set(prompts) else None
    return {
        "model": _place(found["MODEL"]),
        "prompts": ",".join(sets) if sets else relative(prompts_folder(prompts)),
        "wrappers": relative(file) if (file := _wrappers_file(given)) else None,
        "judge": _place(judge) if judge else None,
    }


def _place(model: str) -> str:
    base, adapter = folders.split_adapter(model)
    hub_id = hub.parse(base) if folders.is_on_hub(base) else None
    place = hub_id.repo if hub_id else relative(model_folder(base))
    return f"{place}+{relative(adapter)}" if adapter else place


def default_prompts(model: str) -> str:
    """The prompt set if none is named.

    >>> default_prompts("embedded"), default_prompts("smollm2"), default_prompts("ORG/MODEL")
    ('embedded', 'english', 'jailbreakbench,strongreject,xstest')
    """
    if folders.split_adapter(model)[0] == smollm2.NAME:
        return "english"
    return public.OPEN if folders.is_on_hub(model) else "embedded"


def check_wrappers(prompts: str, given: str | None) -> None:
    """`InputError` for wrappers that cannot be used, and for a list of public sets with an unknown name in it."""
    is_public = is_public_set(prompts)  # raises for a list with an unknown name in it
    if given is not None:
        public.read_wrappers(folders.from_caller(given))
        if not is_public:
            sets = ", ".join(public.SETS)
            raise InputError(f"--wrappers goes with a public prompt set ({sets}); a folder has its T2 pairs in it")


def is_public_set(prompts: str) -> bool:
    """Whether a name asks for public sets: no shipped set and no folder has it."""
    return not prompts_folder(prompts).is_dir() and public.parse(prompts) is not None


def known(found: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    """The parameters with what is in the caches already; nothing is downloaded. Raises InputError for what is not there."""
    if judge := os.environ.get(hub.JUDGE):
        folders.check_judge(judge)
        try:
            hub.set_variable(hub.JUDGE, hub.pinned(judge))
        except InputError:
            lacking = f"{judge} is not in the hub's cache yet: a run without --list downloads it"
            raise InputError(f"--judge: {lacking}") from None
    model, prompts = found["MODEL"], found["PROMPTS"]
    base, adapter = folders.split_adapter(model)
    if base == smollm2.NAME and not smollm2.is_fetched():
        raise InputError(f"{base} is not in the cache yet: a run without --list fetches it")
    model = folders.with_adapter(hub.pinned(base), adapter)
    if is_public_set(prompts):
        folder = public.folder(prompts, model, _wrappers_file(given))
        if not public.is_made(folder):
            what = f"the prompt set {prompts} is not made for {model} yet"
            raise InputError(f"{what}: ./run_all.sh without --list makes it")
        prompts = str(folder)
    return {**found, "MODEL": model, "PROMPTS": prompts}


def fetched(found: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    """The parameters once the model is downloaded, and the prompt set is made of the public sets asked for."""
    if folders.split_adapter(found["MODEL"])[0] == smollm2.NAME:
        smollm2.fetch_smollm2()
    asks = folders.is_on_hub(found["MODEL"]) or is_public_set(found["PROMPTS"]) or os.environ.get(hub.JUDGE)
    do = partial(apart, _fetched) if asks and found["DEVICE"] != "cpu" else _fetched
    return known({**found, "MODEL": do(dict(found), given)}, given)


def apart(do: Callable[..., Made], *given: Any) -> Made:
    """What `do` returns, from a process of its own, whose end gives its memory back to the notebooks.

    What it prints is seen as it comes, and Ctrl-C here ends it.
    """
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1, _become_a_part) as pool:
        made = pool.apply(do, given)
        pool.close()
        pool.join()
    return made


def _become_a_part() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _fetched(found: Mapping[str, Any], given: str | None) -> str:
    """Makes what is missing; returns the model's name with its revision."""
    model = str(found["MODEL"])
    if folders.is_on_hub(model):
        from companion.model import load

        base, adapter = folders.split_adapter(model)
        model = folders.with_adapter(load.prepare_model(base, found["DEVICE"], found["DTYPE"]), adapter)
    if judge := os.environ.get(hub.JUDGE):
        hub.set_variable(hub.JUDGE, _ready_judge(judge, found["DEVICE"]))
    if is_public_set(found["PROMPTS"]):
        file = _wrappers_file(given)
        folder = public.folder(found["PROMPTS"], model, file)
        ensure(folder, found["PROMPTS"], model, file, device=found["DEVICE"], dtype=found["DTYPE"])
    return model


def _wrappers_file(given: str | None) -> Path | None:
    return public.wrappers_file(folders.from_caller(given)) if given else None


def _ready_judge(judge: str, device: str) -> str:
    """The judge's name once it is downloaded; what would stop it in the middle of a run stops here."""
    import torch

    from companion.generation import labels
    from companion.model import load, memory

    # It answers in the notebook's process, on the GPU of the embedding of the model under study.
    device = "cuda:0" if device == "cuda" else device
    try:
        name = load.prepare_model(judge, device, labels.DTYPE, copies=1)
        folder = model_folder(name)
        folders.check_weights(folder)
        tokenizer = load.load_tokenizer(folder)
        labels.answer_tokens(tokenizer, hub.name_of(folder))
        labels.check_judge_fit(memory.on_meta(folder, getattr(torch, labels.DTYPE)), tokenizer)
        memory.check_size(folder, device, labels.DTYPE, copies=1)
    except InputError as error:
        raise InputError(f"--judge: {error}") from error
    return name


def check_prompts(name: str) -> None:
    """`InputError` unless `name` is a shipped prompt set, a public one or a folder."""
    if not prompts_folder(name).is_dir() and public.parse(name) is None:
        known = f"one of the shipped ({', '.join(names(PROMPTS))}), or a public one ({', '.join(public.SETS)})"
        raise InputError(f"no prompt set {name!r}: give a folder or {known}")


def resolve_device(name: str) -> str:
    """`auto` becomes `cuda` or `cpu`; `InputError` if a device is asked for that is not there."""
    if name == "cpu":
        return name
    from companion.base import device

    return device.resolve(name).type if name == "auto" else str(device.resolve(name))


def check_pairs(model: str, prompts: str, pairs: int, profile: str) -> list[str]:
    """Read and tokenize the prompt set; returns what a user should know of it, or `InputError` for what a run cannot use."""
    from companion.prompts.pairs import load_set

    prompt_set = load_set(prompts_folder(prompts))  # first: it needs no model stack and finds most mistakes
    import torch

    from companion.mediation import study
    from companion.model import memory
    from companion.model.load import load_tokenizer
    from companion.prompts import tokens

    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    shapes = memory.on_meta(folder, torch.float32)
    affordable = study.affordable_pairs(shapes, prompt_set)
    chosen = study.chosen_pairs(prompt_set, affordable, profile, pairs)
    usable, dropped = tokens.tokenize(chosen, tokenizer)
    openers = tokens.openers(prompt_set, tokenizer, shapes.unembedding[0].shape[0])
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    notes = {line for found in openers.values() for line in found.notes}
    if affordable and not pairs and profile == "full":
        about = f"about {memory.minutes(shapes, len(usable)):.0f} minutes for all notebooks on this processor"
        costs = f"each pair costs {memory.operations(shapes):.1g} operations ({about})"
        notes.add(f"at most {affordable} pairs a treatment, as {costs}; --pairs gives another number")
    return [f"{len(usable)} of {len(chosen)} pairs usable{reasons}", *sorted(notes)]


@dataclass(frozen=True)
class Collected:
    """The pairs of all sets, the sha256 of each row by its id, how many harmful requests there are, and what was said."""

    pairs: tuple[Pair, ...]
    hashes: Mapping[str, str]
    n_requests: int
    notes: tuple[str, ...]


def ensure(folder: Path, name: str, model: str, wrapper_file: Path | None, *, device: str, dtype: str) -> None:
    """Make the prompt set in `folder` unless it is there: what a user changed in it since, such as outcome.json, stays."""
    from companion.base import thresholds
    from companion.generation import openers
    from companion.model.load import load_tokenizer

    if public.is_made(folder):
        print(f"prompt set: {folder} (remove this folder to make it anew)")
        note = read_json(folder / "set.json")
        for line in note.get("notes", []) if isinstance(note, dict) else []:
            print(f"  when it was made: {line}")
        return
    tokenizer = load_tokenizer(model_folder(model))
    made = collect(name, tokenizer, public.read_wrappers(wrapper_file) if wrapper_file else ())
    print(*made.notes, *public.survival(made.pairs, made.n_requests, tokenizer), sep="\n")
    if not wrapper_file:
        print(f"C1, C2, C4 to C7: {thresholds.NO_WRAPPERS}")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    note = {"sensitive": True, "sets": name, "model": model, "notes": made.notes, "rows": made.hashes}
    write_json(note, folder / "set.json")
    columns = ("id", "treatment", "topic", "control", "treated", "family", "twin")
    rows = [{name: getattr(pair, name) for name in columns if name != "twin" or pair.twin} for pair in made.pairs]
    write_text("".join(json.dumps(row) + "\n" for row in rows), folder / "pairs.jsonl")
    openers.ensure_openers(folder, made.pairs, model=model, device=device, dtype=dtype)
    print(f"prompt set: {folder} (texts stay there; edit outcome.json in it if its words do not fit)")


def collect(name: str, tokenizer: PreTrainedTokenizerBase, templates: Sequence[Wrapper]) -> Collected:
    """The pairs of every set that can be loaded (others are noted; InputError if none can); near copies are one topic.

    A request makes a pair of T1 with its harmless partner, and in each wrapper one of T2, and of T2b if the partner is its twin.
    """
    from companion.prompts.pairs import Pair

    made, notes, seen = list[Pair](), list[str](), set[str]()
    hashes, asked, note = dict[str, str](), dict[str, str](), notes.append
    benign: dict[int, list[Request]] = {}
    for part in public.parse(name) or ():
        is_matched = public.matched(part)
        try:
            if is_matched and not benign:  # before the rows: those of a set left out are not `seen`
                benign = public.by_length(_benign(part), tokenizer)
            loaded = public.load_rows(part)
        except InputError as error:
            note(f"left out: {error}")
            continue
        rows = public.unseen(loaded, seen)
        if n := len(loaded.harmful) - len(rows.harmful):
            which = "an earlier row or set has too (but for case, spacing or closing punctuation)"
            note(f"{part}: {n} rows have a request that {which} and are left out, since topics must be independent")
        if is_matched:
            rows = paired = public.with_partners(rows, benign, tokenizer, seen)
        else:
            if n := rows.harmless.count(None):
                note(f"{part}: {n} of {len(rows.harmful)} harmful rows have no harmless partner of their category")
            paired = public.grouped(rows, tokenizer, part, note)
        # A harmless row is the twin of the harmful one only where the set pairs them row by row: the i-th of a category is a
        # partner for T1, but nothing says that the two ask for the same thing.
        twins = dict(public.partner_pairs(rows)) if not is_matched and public.SETS[part].paired == "row" else {}
        for one, partner in public.partner_pairs(paired):
            made.append(Pair(f"{one.id}-t1", "T1", one.id, partner.text, one.text, family=one.category))
        made += [pair for one in rows.harmful for pair in _wrapped(one, twins.get(one), templates)]
        hashes |= {one.id: one.sha256 for one in (*rows.harmful, *rows.harmless) if one}
        asked |= {one.id: one.text for one in rows.harmful}
    if not made:
        nothing = f"--prompts {name}: none of these sets could be loaded, or no request has a partner"
        raise InputError("; ".join([nothing, *notes]))
    clusters = public.near_duplicates(list(asked.values()))
    first = dict(zip(reversed(clusters), reversed(asked), strict=True))
    topic = {one: first[cluster] for one, cluster in zip(asked, clusters, strict=True)}
    shared = f"those that share {public.OVERLAP:g} of their words are one topic"
    note(f"{len(first)} topics of {len(asked)} requests: {shared}")
    return Collected(tuple(replace(pair, topic=topic[pair.topic]) for pair in made), hashes, len(asked), tuple(notes))


def _benign(part: str) -> tuple[Request, ...]:
    benign = public.SETS[public.BENIGN]
    assert benign.harmless is not None
    try:
        return public.read_public_set(public.BENIGN, benign, benign.harmless)
    except InputError as error:
        raise InputError(f"{part}, which takes harmless partners from {public.BENIGN}: {error}") from error


def _wrapped(harmful: Request, twin: Request | None, templates: Sequence[Wrapper]) -> list[Pair]:
    """T2 of a harmful request in every wrapper, and T2b on its twin if it has one."""
    from companion.prompts.pairs import Pair

    made = []
    for wrapper in templates:
        own, other = f"{harmful.id}-t2-{wrapper.family}", f"{harmful.id}-t2b-{wrapper.family}"
        around = wrapper.around(harmful.text)
        made.append(Pair(own, "T2", harmful.id, *around, twin=other if twin else None, family=wrapper.family))
        if twin:
            made.append(Pair(other, "T2b", harmful.id, *wrapper.around(twin.text), family=wrapper.family))
    return made
