"""Public prompt sets that can be asked for by name, their columns, and where what is made of them is kept.

Nothing of them comes with this repository: the `datasets` library loads them on the user's machine, and the prompt set
made of them is written to the user's cache. Standard library only: the command line imports it.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from helpers import hub
from helpers.errors import InputError
from helpers.paths import ROOT

CACHE = "COMPANION_CACHE"
OUTCOME = "outcome.json"
FILES = ("set.json", "pairs.jsonl", OUTCOME)  # of a prompt set that is made
OPEN = "jailbreakbench,strongreject,xstest"  # with harmless partners from BENIGN where they have none of their own
BENIGN = "alpaca"  # open, and harmless but for what slipped into it


@dataclass(frozen=True)
class Part:
    """Where one kind of request of a set is found: configuration, split, and the rows whose columns have these values.

    An empty `split` stands for the only one (or the first).
    """

    config: str = ""
    split: str = ""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PublicSet:
    """A public set. `text` is the column of the request, `category` that of its kind ("" for none).

    `paired` says how harmless and harmful requests belong together: "row" (row i with row i, of one category), "order"
    (the i-th of a category with the i-th of the same category), or "" (they do not). `access` is shown when it cannot be
    loaded.
    """

    repo: str
    text: str
    category: str = ""
    harmful: Part | None = None
    harmless: Part | None = None
    paired: str = ""
    sensitive: bool = True
    access: str = "open"


def _harmful(
    repo: str, text: str = "prompt", category: str = "category", *, access: str = "open", config: str = ""
) -> PublicSet:
    return PublicSet(repo, text, category, Part(config), access=access)


SETS: Mapping[str, PublicSet] = {
    "jailbreakbench": PublicSet(
        "JailbreakBench/JBB-Behaviors", "Goal", "Category",
        Part("behaviors", "harmful"), Part("behaviors", "benign"), paired="row",
    ),
    "strongreject": _harmful("walledai/StrongREJECT"),
    "maliciousinstruct": _harmful("walledai/MaliciousInstruct", category=""),
    "xstest": PublicSet(
        "walledai/XSTest", "prompt", "type",
        Part(where={"label": ("unsafe",)}), Part(where={"label": ("safe",)}), paired="order",
    ),
    "or-bench": PublicSet(
        "bench-llm/or-bench", "prompt", "category", Part("or-bench-toxic"), Part("or-bench-hard-1k"), paired="order"
    ),
    "alpaca": PublicSet(
        "tatsu-lab/alpaca", "instruction", "", harmless=Part(where={"input": ("",)}), sensitive=False
    ),
    "advbench": _harmful("walledai/AdvBench", category="", access="may be gated"),
    "harmbench": _harmful("walledai/HarmBench", access="may be gated", config="standard"),
    "wildjailbreak": PublicSet(
        "allenai/wildjailbreak", "vanilla", "",
        Part("train", where={"data_type": ("vanilla_harmful",)}), Part("train", where={"data_type": ("vanilla_benign",)}),
        access="gated",
    ),
    "sorry-bench": PublicSet(
        "sorry-bench/sorry-bench-202503", "turns", "category", Part(where={"prompt_style": ("base",)}), access="gated"
    ),
    "wildguardmix": PublicSet(
        "allenai/wildguardmix", "prompt", "subcategory",
        Part("wildguardtest", where={"prompt_harm_label": ("harmful",)}),
        Part("wildguardtest", where={"prompt_harm_label": ("unharmful",)}),
        access="gated",
    ),
}  # fmt: skip


def parse(name: str) -> tuple[str, ...] | None:
    """The public sets that a name asks for, or None if it names none; several are joined by commas.

    `+alpaca` behind a set of pairs asks for harmless partners of equal length instead of its own.

    >>> parse("jailbreakbench,strongreject"), parse("xstest+alpaca"), parse("my-folder")
    (('jailbreakbench', 'strongreject'), ('xstest+alpaca',), None)
    """
    asked = tuple(part.strip() for part in name.split(","))
    known = [part.removesuffix(f"+{BENIGN}") in SETS for part in asked]
    if not any(known):
        return None
    if not all(known) or len(set(asked)) < len(asked):
        raise InputError(f"--prompts {name}: public sets, each once, joined by commas; known are {', '.join(SETS)}")
    harmless = [part for part in asked if SETS[part.removesuffix(f"+{BENIGN}")].harmful is None]
    if harmless:
        raise InputError(
            f"--prompts {name}: {harmless[0]} has harmless requests only; it goes behind a set of harmful ones, as in "
            f"jailbreakbench+{BENIGN}"
        )
    return asked


def matched(part: str) -> bool:
    """Whether harmless partners are taken from Alpaca, by length: asked for, or because the set pairs nothing."""
    return part.endswith(f"+{BENIGN}") or not SETS[part].paired


def cache() -> Path:
    """The user's folder for prompts made of public sets; `InputError` if it lies inside the repository.

    `COMPANION_CACHE` names it; without it, it lies in `HF_HOME`, else in the user's cache.
    """
    named = os.environ.get(CACHE)
    place = hub.expanded(named) if named else hub.home() / "companion"
    if place.resolve().is_relative_to(ROOT):
        raise InputError(f"{CACHE}={place} lies inside the repository, where public prompts must not be: name another")
    return place.resolve()


def folder(name: str, model: str, wrappers: Path | None) -> Path:
    """Where the prompt set is kept that was made of public sets for one model, wrappers, and the outcome beside them."""
    files = (wrappers, own_outcome(wrappers))
    content = b"".join(file.read_bytes() for file in files if file)
    key = hashlib.sha256(f"{name}\n{model}\n".encode() + content).hexdigest()[:12]
    return cache() / "prompts" / f"{name.replace(',', '-').replace('+', '-')}-{key}"


def own_outcome(wrappers: Path | None) -> Path | None:
    """The user's own outcome.json beside the wrappers, if there is one."""
    file = wrappers.parent / OUTCOME if wrappers else None
    return file if file and file.is_file() else None


def is_made(place: Path) -> bool:
    """Whether a prompt set's folder holds all that belongs to it."""
    return all((place / name).is_file() for name in FILES)
