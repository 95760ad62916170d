"""A list of models to run one after another (`./run_all.sh --models FILE`): reading it, and running every entry.

The command line imports this before any package is installed, so only `read` asks for PyYAML.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from companion.base import hub
from companion.base.errors import InputError
from companion.base.folders import check_model, expanded, names
from companion.base.paths import ORGANISM, PROMPTS

KEYS: Mapping[str, type] = {
    "model": str,
    "prompts": str,
    "wrappers": str,
    "judge": str,
    "name": str,
    "device": str,
    "dtype": str,
    "profile": str,
    "pairs": int,
}


KINDS = {str: "text (quote it if it looks like a number or a date)", int: "a whole number"}


FOLDERS = {"model": ORGANISM, "prompts": PROMPTS, "judge": ORGANISM}


def read_model_list(path: Path) -> list[list[str]]:
    """The flags of each entry, such as `["--model=/models/a", "--name=a"]`; folders count from the list's own folder.

    Raises `InputError` naming the entry for anything but a list of entries with known keys and plain values.
    """
    content = _load(path)
    entries = content.get("models") if isinstance(content, dict) and set(content) == {"models"} else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected one key 'models' with a list of at least one entry; see models.example.yml")
    return [_flags(entry, path.parent, f"{path}, entry {place}") for place, entry in enumerate(entries, start=1)]


def _load(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise InputError(f"no list of models at {path}: give a file like models.example.yml")
    try:
        text = path.read_text(encoding="utf-8-sig")
        _refuse_twice(yaml.compose(text, Loader=yaml.SafeLoader), path)
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{where}: broken YAML ({error.problem}); see models.example.yml") from error
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as YAML in UTF-8 ({reason}); see models.example.yml") from error


def _refuse_twice(node: Any, path: Path) -> None:
    """YAML keeps the last of two equal keys without a word, so a mistake would show in the results only."""
    import yaml

    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or not isinstance(one, yaml.CollectionNode):
            continue
        seen.add(id(one))
        if isinstance(one, yaml.MappingNode):
            keys = [key.value for key, _ in one.value if isinstance(key, yaml.ScalarNode)]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                line = one.start_mark.line + 1
                raise InputError(f"{path}, line {line}: {twice[0]!r} is given twice in one entry; keep one of them")
            waiting += [value for _, value in one.value]
        else:
            waiting += one.value


def _flags(entry: Any, folder: Path, where: str) -> list[str]:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected keys and values ({', '.join(KEYS)}), found {type(entry).__name__}")
    for key, value in entry.items():
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(KEYS)}"
            raise InputError(f"{where}: unknown key {key!r}: {hint}")
        if type(value) is not KEYS[key]:
            raise InputError(f"{where}: {key!r} must be {KINDS[KEYS[key]]}, not {value!r:.60}")
        if "\0" in str(value):
            raise InputError(f"{where}: {key!r} holds a null character; take it out")
        if key in ("wrappers", "judge") and not str(value).strip():
            raise InputError(f"{where}: {key!r} names nothing; leave the key out")
    placed = {key: _placed(key, value, folder) for key, value in entry.items()}
    if "judge" in placed:
        try:
            check_model(str(placed["judge"]))
        except InputError as error:
            raise InputError(f"{where}, 'judge': {error}") from error
    return [f"--{key}={value}" for key, value in placed.items()]


def _placed(key: str, value: Any, folder: Path) -> Any:
    """A folder or file named in the list as an absolute path; a shipped name, and all else, as it is."""
    if key == "wrappers":  # always a path
        return (folder / expanded(value)).resolve()
    if key not in FOLDERS or not value.strip() or value in names(FOLDERS[key]):
        return value
    placed = folder / expanded(value)
    return placed.resolve() if placed.is_dir() else value


def refuse_same_names(slugs: Sequence[str], path: Path) -> None:
    """`InputError` if two entries would write into one folder; some systems do not tell `A` from `a`."""
    seen: dict[str, int] = {}
    for place, slug in enumerate(slugs, start=1):
        first = seen.setdefault(slug.lower(), place)
        if first != place:
            raise InputError(f"{path}: entries {first} and {place} are both named {slug!r}: give one another 'name'")


def run_model_list(runs: Mapping[str, Callable[[], int]]) -> int:
    """Run all, by name, whether or not one fails, by whatever error; returns 0, or 1 if one did."""
    failed: list[str] = []
    for place, (slug, run) in enumerate(runs.items(), start=1):
        print(f"{'' if place == 1 else chr(10)}=== model {place} of {len(runs)}: {slug}", flush=True)
        try:
            hub.choose_judge(_judge(run))
            status = run()
        except Exception as error:  # Ctrl-C is none, and stops the list
            print(f"{slug}: {_line(error)}", file=sys.stderr, flush=True)
            status = 2
        failed += [slug] if status else []
    print(f"\n{len(runs) - len(failed)} of {len(runs)} models finished", flush=True)
    if failed:
        print(f"not finished: {', '.join(failed)}; the same command tries these again", file=sys.stderr)
    return int(bool(failed))


def _judge(run: Callable[[], int]) -> str | None:
    """The judge of an entry: the command line hands each run over with the entry's flags bound to it."""
    return run.args[0].judge if isinstance(run, partial) else None


def _line(error: Exception) -> str:
    """An error in one line; the type of one that nobody foresaw says more than its message."""
    text = " ".join(str(error).split())
    is_said = isinstance(error, InputError | OSError) and text
    return text if is_said else f"{type(error).__name__}: {text}".removesuffix(": ")
