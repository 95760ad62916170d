"""Where everything of the repository lies, and what may name a run's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from companion.base.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CODE = tuple(ROOT / name for name in ("helpers", "companion", "organisms"))  # whatever results can rest on
DATA = ROOT / "data"
ORGANISM, PROMPTS, CALIBRATION, REFUSER = (DATA / name for name in ("organism", "prompts", "calibration", "refuser"))
NOTEBOOKS = ROOT / "notebooks"
# A test run must not write over what is committed, so these two can be moved.
RESULTS = Path(os.environ.get("COMPANION_RESULTS") or ROOT / "results").resolve()
FIGURES = Path(os.environ.get("COMPANION_FIGURES") or ROOT / "figures").resolve()
PARTS = "parts"  # of sharded sweeps: many, and written whole one by one, so a stage shows the folder itself


def check_slug(slug: str) -> str:
    """The name of a run, if it can be a folder's name on every system; `InputError` if it cannot.

    >>> check_slug("qwen2-0.5b")
    'qwen2-0.5b'
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", slug) or len(slug) > 100:
        rule = "letters, digits, '.', '_', '-', no leading dot" if len(slug) <= 100 else "at most 100 characters"
        raise InputError(f"{slug!r} cannot name a run: {rule}; --name gives another")
    return slug


def results_dir(slug: str) -> Path:
    """The folder of a run's result files, made if it is not there."""
    return _made(RESULTS / check_slug(slug))


def figures_dir(slug: str) -> Path:
    """The folder of a run's figures, made if it is not there."""
    return _made(FIGURES / check_slug(slug))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def relative(path: Path | str) -> str:
    """The path as a reader of the repository would write it, wherever a test run keeps its folders.

    >>> relative(RESULTS / "embedded" / "02_layers.parquet")
    'results/embedded/02_layers.parquet'
    """
    resolved = Path(path).resolve()
    for home, name in {RESULTS: "results", FIGURES: "figures", ROOT: "."}.items():
        if resolved.is_relative_to(home):
            return (Path(name) / resolved.relative_to(home)).as_posix()
    return str(path)


def at_home(given: str) -> Path:
    """The path with a leading `~` or `~user` replaced; as it is where nobody has that name, or the user no home."""
    return Path(os.path.expanduser(given))  # noqa: PTH111 - Path's own raises there
