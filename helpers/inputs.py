"""From what was typed to what a run uses: models and public prompt sets by name become folders. Imports nothing heavy."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers import freshness, hub, preflight, public_list, runner, wrappers
from helpers.errors import InputError
from helpers.paths import PROMPTS, check_slug, relative

LONGEST = 90  # characters of a name that nobody chose


def slug(found: Mapping[str, Any], name: str | None, judge: str | None, given: str | None) -> str:
    """The run's name, as given or by default; `given` are its wrappers.

    Raises InputError for a name that cannot be, and for that of a run with another model, prompt set, wrappers or judge.
    """
    chosen = check_slug(default_slug(found, judge, given) if name is None else name)
    if chosen == "embedded" and (judge or found != runner.DEFAULTS):
        raise InputError("--name embedded is the run with no flags, whose results are kept: choose another name")
    before = freshness.recall(runner.RESULTS / chosen, runner.MADE_FROM)
    for kind, now in made_from(found, judge, given).items():
        then = before.get(kind, now)
        if isinstance(then, str | None) and then != now and not _is_moved(then, now):
            has, asked = (f"{kind} {place}" if place else f"no {kind}" for place in (then, now))
            raise InputError(
                f"the results of {chosen!r} were made with {has}, and now it would be {asked}: give this run a name of its "
                "own with --name"
            )
    return chosen


def default_slug(found: Mapping[str, Any], judge: str | None = None, given: str | None = None) -> str:
    """The run's name if none is given: what differs from the default, and a hash in place of the end of a long one.

    Inputs that lie elsewhere and are called the same have the same name, which is why `slug` looks where they lie.

    >>> default_slug(runner.DEFAULTS)
    'embedded'
    >>> default_slug({**runner.DEFAULTS, "MODEL": "window-1", "PAIRS": 50})
    'window-1-pairs50'
    >>> default_slug({**runner.DEFAULTS, "PROMPTS": "xstest"}, given="my/own.jsonl")
    'embedded-xstest-wrappers-own'
    """
    parts = [hub.slug(found["MODEL"])]
    if found["PROMPTS"] != "embedded":
        parts.append(Path(found["PROMPTS"]).name)
    plain = {name: found[name] for name in ("DEVICE", "DTYPE", "PROFILE")}
    parts += [value for name, value in plain.items() if value != runner.DEFAULTS[name]]
    parts += [f"pairs{found['PAIRS']}"] if found["PAIRS"] else []
    if given:
        place = preflight.from_caller(given).resolve()
        parts.append(f"wrappers-{place.name if place.is_dir() else place.stem}")
    parts += [f"judge-{hub.slug(judge)}"] if judge else []
    whole = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).lstrip(".")
    if len(whole) <= LONGEST:
        return whole
    tail = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{whole[: LONGEST - 9]}-{tail}"


def made_from(found: Mapping[str, Any], judge: str | None, given: str | None) -> dict[str, str | None]:
    """What a run is asked to study: its model, prompts, wrappers and judge, by name or by the place where each lies.

    Of a model of the hub its repository: another revision is the same model changed, as is a folder whose files changed.
    """
    prompts = found["PROMPTS"]
    sets = public_list.parse(prompts) if is_public_set(prompts) else None
    return {
        "model": _place(found["MODEL"]),
        "prompts": ",".join(sets) if sets else relative(preflight.prompts_folder(prompts)),
        "wrappers": relative(wrappers.file_of(preflight.from_caller(given))) if given else None,
        "judge": _place(judge) if judge else None,
    }


def _place(model: str) -> str:
    hub_id = None if Path(model).is_dir() else hub.parse(model)
    return hub_id.repo if hub_id else relative(preflight.model_folder(model))


def _is_moved(then: str | None, now: str | None) -> bool:
    """Whether two folders may be one: it is no longer where it was."""
    if then is None or now is None:
        return False
    return Path(then).is_absolute() and Path(now).is_absolute() and not Path(then).exists()


def default_prompts(model: str) -> str:
    """The prompt set if none is named: the embedded language, or for a model of the hub the open public sets.

    >>> default_prompts("embedded"), default_prompts("ORG/MODEL")
    ('embedded', 'jailbreakbench,strongreject,xstest')
    """
    is_hub = hub.parse(model) is not None and not preflight.from_caller(model).is_dir()
    return public_list.OPEN if is_hub else "embedded"


def check(prompts: str, given: str | None) -> None:
    """`InputError` for wrappers that cannot be used, and for a list of public sets with an unknown name in it."""
    is_public = is_public_set(prompts)
    if given is None:
        return
    if not given.strip():
        raise InputError("--wrappers names nothing: give a file of wrappers, or leave the flag out")
    wrappers.read(preflight.from_caller(given))
    if not is_public:
        raise InputError(
            f"--wrappers goes with a public prompt set ({', '.join(public_list.SETS)}); a folder has its T2 pairs in it"
        )


def is_public_set(prompts: str) -> bool:
    """Whether a name asks for public sets: no shipped set and no folder has it."""
    is_own = prompts in preflight.names(PROMPTS) or preflight.from_caller(prompts).is_dir()
    return not is_own and public_list.parse(prompts) is not None


def known(found: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    """The parameters with what is in the caches already; nothing is downloaded. Raises InputError for what is not there."""
    judge = os.environ.get(hub.JUDGE)
    if judge:
        hub.choose_judge(_pinned_judge(judge))
    model = hub.pinned(found["MODEL"]) if not Path(found["MODEL"]).is_dir() else found["MODEL"]
    return {**found, "MODEL": model, "PROMPTS": _prompts(found["PROMPTS"], model, given)}


def fetched(found: Mapping[str, Any], given: str | None) -> dict[str, Any]:
    """The parameters once the model is downloaded, and the prompt set is made of the public sets asked for."""
    model = found["MODEL"]
    if hub.parse(model) is not None and not Path(model).is_dir():
        from helpers import hub_fetch

        model = hub_fetch.ready(model, found["DEVICE"], found["DTYPE"])
    judge = os.environ.get(hub.JUDGE)
    if judge:
        hub.choose_judge(_ready_judge(judge, {**found, "MODEL": model}))
    if is_public_set(found["PROMPTS"]):
        from helpers import public_make

        file = wrappers.file_of(preflight.from_caller(given)) if given else None
        folder = public_list.folder(found["PROMPTS"], model, file)
        public_make.ensure(folder, found["PROMPTS"], model, file, device=found["DEVICE"], dtype=found["DTYPE"])
    return known({**found, "MODEL": model}, given)


def _pinned_judge(judge: str) -> str:
    preflight.check_judge(judge)
    try:
        return judge if Path(judge).is_dir() else hub.pinned(judge)
    except InputError:
        raise InputError(f"--judge: {judge} is not in the hub's cache yet: a run without --list downloads it") from None


def _ready_judge(judge: str, found: Mapping[str, Any]) -> str:
    """The judge's name once it is downloaded; what would stop it in the middle of a run stops here."""
    import torch

    from helpers import hub_fetch, judging, model_files, model_size

    preflight.check_judge(judge)
    # It answers in the notebook's process, where the model under study and what that is compared with stay in memory, and
    # on the GPU of that model's embedding.
    beside = model_size.taken(preflight.model_folder(found["MODEL"]), found["DEVICE"], found["DTYPE"])
    device = "cuda:0" if found["DEVICE"] == "cuda" else found["DEVICE"]
    try:
        name = hub_fetch.ready(judge, device, judging.DTYPE, copies=1, beside=beside)
        folder = preflight.model_folder(name)
        model_files.check_folder(folder)
        preflight.check_weights(folder)
        tokenizer = preflight.tokenizer_of(folder)
        judging.answer_tokens(tokenizer, hub.name_of(folder))
        judging.check_fit(model_size.on_meta(folder, getattr(torch, judging.DTYPE)), tokenizer)
        model_size.checked(folder, device, judging.DTYPE, copies=1, beside=beside)
    except InputError as error:
        raise InputError(f"--judge: {error}") from error
    return name


def _prompts(name: str, model: str, given: str | None) -> str:
    if not is_public_set(name):
        return name
    folder = public_list.folder(name, model, wrappers.file_of(preflight.from_caller(given)) if given else None)
    if not public_list.is_made(folder):
        raise InputError(f"the prompt set {name} is not made for {model} yet: ./run_all.sh without --list makes it")
    return str(folder)
