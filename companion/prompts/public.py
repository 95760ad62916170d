"""Public prompt sets that can be asked for by name, their columns, and where what is made of them is kept.

Nothing of them comes with this repository: the `datasets` library loads them on the user's machine, and the prompt set
made of them is written to the user's cache. Standard library only: the command line imports it.

Harmless partners of harmful requests for T1: the row's own, or one of equal length in a model's tokens.

An interchange needs equal token length, so how many requests have such a partner is counted and said.

Rows of public prompt sets, read on the user's machine through the `datasets` library.

Texts stay in memory and in the user's cache. Errors name columns and row numbers, never a text.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub_errors
from transformers import PreTrainedTokenizerBase

from companion.base import hub, network
from companion.base.errors import InputError
from companion.base.hub import HubId
from companion.base.paths import ROOT
from companion.prompts import tokens
from companion.prompts.pairs import Pair

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


FEW = 0.5  # of the requests or pairs: below it the user is told what else can be done


def pairs(rows: Rows) -> list[tuple[Request, Request]]:
    """Harmful requests with their partners, where they have one of another text."""
    both = zip(rows.harmful, rows.harmless, strict=True)
    return [(one, other) for one, other in both if other is not None and one.text != other.text]


def grouped(rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str, report: Callable[[str], object]) -> Rows:
    """The same rows where enough of them have equal length; else the two groups are interchanged.

    Then every harmful request takes activations of a harmless one drawn from the set's own group of that length, instead
    of its row's: effects are those of the groups, and include all in which their members differ.
    """
    own = sum(length(one, tokenizer) == length(other, tokenizer) for one, other in pairs(rows))
    if own >= FEW * len(rows.harmful):
        return rows
    harmless = by_length([one for one in rows.harmless if one is not None], tokenizer)
    drawn = with_partners(rows, harmless, tokenizer)
    n_drawn = len(pairs(drawn))
    if n_drawn <= own:
        return rows
    report(
        f"{name}: {own} of {len(rows.harmful)} rows have the length of their own partner, so groups are interchanged: T1 "
        f"takes a partner of equal length from all harmless rows of the set ({n_drawn} pairs)"
    )
    return drawn


def length(request: Request, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the rendered prompt."""
    return len(tokens.encode(tokenizer, request.text)[0])


def by_length(requests: Iterable[Request], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[Request]]:
    """Requests by the length of their rendered prompt in this model's tokens, each list in a fixed random order."""
    found: dict[int, list[Request]] = {}
    for request in requests:
        found.setdefault(length(request, tokenizer), []).append(request)
    for n in found:
        random.Random(n).shuffle(found[n])
    return found


def with_partners(
    rows: Rows, benign: dict[int, list[Request]], tokenizer: PreTrainedTokenizerBase, seen: set[str] | None = None
) -> Rows:
    """Each harmful request with a harmless one of equal token length, none used twice; None where none is left.

    With `seen` no partner has a text that another topic has (`Request.same`), and it is added.
    """
    found = []
    for request in rows.harmful:
        waiting = benign.get(length(request, tokenizer), [])
        while waiting and seen is not None and waiting[-1].same in seen:
            waiting.pop()
        found.append(waiting.pop() if waiting else None)
        if seen is not None and found[-1] is not None:
            seen.add(found[-1].same)
    return Rows(rows.harmful, tuple(found))


def survival(made: Sequence[Pair], n_requests: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How many pairs of each treatment have equal token length, with what to do where few do.

    Of T1 that is counted against all `n_requests` harmful requests, as one without a partner makes no pair at all.
    """
    usable = Counter(pair.treatment for pair in made if tokens.token_pair(pair, tokenizer)[0] is not None)
    lost = n_requests - usable["T1"]
    line = f"T1: {usable['T1']} of {n_requests} requests have a benign partner of their length and can be interchanged"
    if lost:
        line += f"; {lost} of {n_requests} requests have no benign partner of their length"
    if usable["T1"] < FEW * n_requests:
        line += f"; few: take harmless partners by length (+{BENIGN}), or sets with more rows"
    lines = [line]
    for treatment, n in sorted(Counter(pair.treatment for pair in made if pair.treatment != "T1").items()):
        line = f"{treatment}: {usable[treatment]} of {n} pairs have equal token length and can be interchanged"
        if usable[treatment] < FEW * n:
            line += "; few: lengthen the neutral template until both have equally many tokens"
        lines.append(line)
    return lines


ALIAS = {
    "real_group_nons_discr": "discr", "nons_group_real_discr": "discr",
    "privacy_public": "privacy", "privacy_fictional": "privacy",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request: the set and its row, the kind it is of, and its text. It is known by id and hash."""

    name: str
    row: int
    category: str
    text: str

    @property
    def id(self) -> str:
        """The set and the row number, for example "xstest-017"."""
        return f"{self.name}-{self.row:03d}"

    @property
    def sha256(self) -> str:
        """Hash of the text, by which a row is recognised without being shown."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def same(self) -> str:
        """Hash of the text without case, spacing and closing punctuation: equal where two sets have one request.

        >>> Request("a", 0, "", "How  do I?").same == Request("b", 1, "", "how do i").same
        True
        """
        return hashlib.sha256(" ".join(self.text.casefold().split()).rstrip(" .!?").encode()).hexdigest()


@dataclass(frozen=True)
class Rows:
    """Harmful requests of one set and, where it pairs them, the harmless one of each (else None)."""

    harmful: tuple[Request, ...]
    harmless: tuple[Request | None, ...]


def load_rows(part: str) -> Rows:
    """The requests of one public set (`companion.prompts.public.SETS`), by its name, perhaps with `+alpaca` behind it.

    Raises InputError for a set that cannot be loaded (gated, no network), that lacks a column, or whose harmful and
    harmless rows do not correspond.
    """
    name = part.removesuffix(f"+{BENIGN}")
    public = SETS[name]
    assert public.harmful is not None, "public_list.parse refuses a set without harmful requests"
    harmful = read_public_set(name, public, public.harmful)
    if matched(part):
        return Rows(harmful, (None,) * len(harmful))
    assert public.harmless is not None, "a set that pairs its rows has both kinds"
    harmless = read_public_set(f"{name}-harmless", public, public.harmless)
    return by_row(harmful, harmless) if public.paired == "row" else by_order(harmful, harmless)


def unseen(rows: Rows, seen: set[str]) -> Rows:
    """The rows of which neither side was `seen` (by `Request.same`); what they hold is added to `seen`.

    Topics are drawn as if independent, so one request may not stand in two of them.
    """
    kept: list[tuple[Request, Request | None]] = []
    for one, other in zip(rows.harmful, rows.harmless, strict=True):
        keys = {one.same} | ({other.same} if other else set())
        if not keys & seen:
            kept.append((one, other))
            seen |= keys
    return Rows(tuple(one for one, _ in kept), tuple(other for _, other in kept))


def read_public_set(name: str, public: PublicSet, part: Part) -> tuple[Request, ...]:
    """The requests of one kind, in the order of the set; rows keep their numbers in it."""
    table = _table(name, public, part)
    wanted = [public.text, *([public.category] if public.category else []), *part.where]
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise InputError(
            f"{public.repo} has no column {missing[0]!r} (it has {', '.join(table.column_names)}): the set has changed, "
            "so adapt its line in companion/prompts/public.py"
        )
    columns = {column: table[column] for column in wanted}
    kept = [
        row for row in range(len(table))
        if all(str(columns[column][row] or "") in values for column, values in part.where.items())
    ]  # fmt: skip
    made = (Request(name, i, _category(columns, public, i), _text(columns[public.text][i])) for i in kept)
    found = tuple(request for request in made if request.text)
    if not found:
        where = "".join(f", {column} {' or '.join(map(repr, values))}" for column, values in part.where.items())
        raise InputError(
            f"{name}: none of the {len(table)} rows of {public.repo} holds a request (column {public.text}{where}): the set "
            "has changed, so adapt its line in companion/prompts/public.py"
        )
    return found


def by_row(harmful: Sequence[Request], harmless: Sequence[Request]) -> Rows:
    """Row i with row i, after the check that both are as many and of the same categories."""
    at = {request.row: request for request in harmless}
    wrong = [request for request in harmful if request.row not in at or at[request.row].category != request.category]
    if wrong or len(harmful) != len(harmless):
        lacks = "differs in its category" if wrong and wrong[0].row in at else "has no harmless request"
        where = f"row {wrong[0].row} {lacks}" if wrong else f"{len(harmful)} and {len(harmless)} rows"
        raise InputError(
            f"{harmful[0].name}: harmful and harmless rows do not correspond ({where}); "
            f"name {harmful[0].name}+{BENIGN} to take harmless partners by length"
        )
    return Rows(tuple(harmful), tuple(at[request.row] for request in harmful))


def by_order(harmful: Sequence[Request], harmless: Sequence[Request]) -> Rows:
    """The i-th harmful request of a category with the i-th harmless one; None where there is none left.

    XSTest calls the unsafe counterpart of a type "contrast_" and the type, or for two kinds of a type (`ALIAS`) what they
    have in common.
    """
    waiting: dict[str, list[Request]] = defaultdict(list)
    for request in harmless:
        waiting[_kind(request.category)].append(request)
    lists = [waiting[_kind(request.category)] for request in harmful]
    partners = tuple(one.pop(0) if one else None for one in lists)
    if not any(partners):
        raise InputError(f"{harmful[0].name}: no category has harmful and harmless requests; name it with +{BENIGN}")
    return Rows(tuple(harmful), partners)


def _kind(category: str) -> str:
    kind = category.removeprefix("contrast_")
    return ALIAS.get(kind, kind)


def _table(name: str, public: PublicSet, part: Part) -> Any:
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # it reports every attempt; the last one's error is explained below
    try:
        found = datasets.load_dataset(public.repo, *([part.config] if part.config else []))
    except Exception as error:  # foreign files make the library raise anything; its own story may quote a row
        raise _explain(name, public, error) from None
    if part.split and part.split not in found:
        raise InputError(
            f"{public.repo} has no split {part.split!r} (it has {', '.join(found)}): adapt companion/prompts/public.py"
        )
    return found[part.split or next(iter(found))]


def _explain(name: str, public: PublicSet, error: Exception) -> InputError:
    """`datasets` hides the hub's answer behind an error of its own, so its words are read where its kind says nothing."""
    hidden = error.__cause__ or error
    is_gated = "gated" in str(error).lower() or isinstance(hidden, hub_errors.GatedRepoError)
    if is_gated:
        page = f"huggingface.co/datasets/{public.repo}"
        return InputError(f"{name} is gated: accept its terms at {page} with your account, then {network.TOKEN_HELP}")
    if network.is_network(error) or network.is_network(hidden):
        return InputError(
            f"{name} ({public.repo}) is not in the cache and the hub cannot be reached: connect, unset HF_HUB_OFFLINE and "
            "HF_DATASETS_OFFLINE, or name in HF_HOME the cache of a machine that has it"
        )
    if isinstance(hidden, hub_errors.HfHubHTTPError):
        return network.explain(HubId(public.repo), hidden, "data set")
    if isinstance(hidden, RuntimeError) and "scripts are no longer supported" in str(hidden):
        return InputError(
            f"{name} ({public.repo}) is read by a script of its own, which the installed library datasets runs no more: name "
            "another set, or adapt its line in companion/prompts/public.py to a copy of its rows"
        )
    if isinstance(hidden, RuntimeError):
        return InputError(
            f"the transfer of {name} ({public.repo}) broke off ({type(hidden).__name__}): {network.AGAIN}"
        )
    return InputError(
        f"{name} ({public.repo}, {public.access}) could not be loaded ({type(error).__name__}): is its name still that, "
        f"does it hold rows, and do you have access? If it is gated, {network.TOKEN_HELP}"
    )


def _category(columns: dict[str, Any], public: PublicSet, row: int) -> str:
    return str(columns[public.category][row] or "") if public.category else ""


def _text(value: Any) -> str:
    """The user's turn; some sets hold a list of turns, of which the first counts."""
    first = value[0] if isinstance(value, list) and value else value
    return first.strip() if isinstance(first, str) else ""
