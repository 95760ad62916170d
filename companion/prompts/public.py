"""Public prompt sets by name: where each is found, its requests, their harmless partners of equal token length, and the
wrappers that a user puts around them.

Nothing of them comes with this repository: the `datasets` library loads them on the user's machine, and the prompt set made
of them is written to the user's cache. Errors name columns and row numbers, never a text.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.base import hub
from companion.base.errors import InputError
from companion.base.files import BrokenJson, parse_json, read_utf8

if TYPE_CHECKING:  # the command line imports this module, and waits for no model library
    from transformers import PreTrainedTokenizerBase

    from companion.prompts.pairs import Pair

OUTCOME = "outcome.json"
FILES = ("set.json", "pairs.jsonl", OUTCOME)  # of a prompt set that is made
OPEN = "jailbreakbench,strongreject,xstest"  # with harmless partners from BENIGN where they have none of their own
BENIGN = "alpaca"  # open, and harmless but for what slipped into it
# XSTest calls the unsafe counterpart of a type "contrast_" and the type, or for two kinds of a type what they share.
ALIAS = {
    "real_group_nons_discr": "discr", "nons_group_real_discr": "discr",
    "privacy_public": "privacy", "privacy_fictional": "privacy",
}  # fmt: skip
OVERLAP = 0.6  # of the words of two requests, from which they are one topic: public sets repeat requests in other words
BLOCK = 500  # requests that are compared with all at once
FEW = 0.5  # of the requests or pairs: below it the user is told what else can be done
SLOT = "{request}"  # in a template of a wrapper
WRAPPERS = "wrappers.jsonl"
FIELDS = ("family", "neutral", "jailbreak")
CHANGED = "adapt its line in companion/prompts/public.py"


@dataclass(frozen=True)
class Part:
    """Where one kind of request of a set is found: configuration, split (or the first), rows whose columns have these values."""

    config: str = ""
    split: str = ""
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PublicSet:
    """A public set. `text` is the column of the request, `category` that of its kind ("" for none).

    `paired` says how its harmless and harmful requests belong together: "row" (row i with row i), "order" (the i-th of a
    category with the i-th of the same category), or "" (they do not). `access` is shown when it cannot be loaded.
    """

    repo: str
    text: str
    category: str = ""
    harmful: Part | None = None
    harmless: Part | None = None
    paired: str = ""
    access: str = "open"


SETS: Mapping[str, PublicSet] = {
    "jailbreakbench": PublicSet(
        "JailbreakBench/JBB-Behaviors", "Goal", "Category",
        Part("behaviors", "harmful"), Part("behaviors", "benign"), paired="row",
    ),
    "strongreject": PublicSet("walledai/StrongREJECT", "prompt", "category", Part()),
    "maliciousinstruct": PublicSet("walledai/MaliciousInstruct", "prompt", harmful=Part()),
    "xstest": PublicSet(
        "walledai/XSTest", "prompt", "type",
        Part(where={"label": ("unsafe",)}), Part(where={"label": ("safe",)}), paired="order",
    ),
    "or-bench": PublicSet(
        "bench-llm/or-bench", "prompt", "category", Part("or-bench-toxic"), Part("or-bench-hard-1k"), paired="order"
    ),
    "alpaca": PublicSet("tatsu-lab/alpaca", "instruction", harmless=Part(where={"input": ("",)})),
    "advbench": PublicSet("walledai/AdvBench", "prompt", harmful=Part(), access="may be gated"),
    "harmbench": PublicSet("walledai/HarmBench", "prompt", "category", Part("standard"), access="may be gated"),
    "wildjailbreak": PublicSet(
        "allenai/wildjailbreak", "vanilla", "", Part("train", where={"data_type": ("vanilla_harmful",)}), access="gated"
    ),
    "sorry-bench": PublicSet(
        "sorry-bench/sorry-bench-202503", "turns", "category", Part(where={"prompt_style": ("base",)}), access="gated"
    ),
    "wildguardmix": PublicSet(
        "allenai/wildguardmix", "prompt", "subcategory",
        Part("wildguardtest", where={"prompt_harm_label": ("harmful",)}), access="gated",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One request: the set and its row, the kind it is of, and its text. It is shown by id ("xstest-017") and hash."""

    name: str
    row: int
    category: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.name}-{self.row:03d}"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def same(self) -> str:
        """Hash of the text without case, spacing and closing punctuation: equal where two sets have one request."""
        return hashlib.sha256(" ".join(self.text.casefold().split()).rstrip(" .!?").encode()).hexdigest()


@dataclass(frozen=True)
class Rows:
    """Harmful requests of one set and, where it pairs them, the harmless one of each (else None)."""

    harmful: tuple[Request, ...]
    harmless: tuple[Request | None, ...]


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
    if harmless := [part for part in asked if SETS[part.removesuffix(f"+{BENIGN}")].harmful is None]:
        what = f"{harmless[0]} has harmless requests only; it goes behind a set of harmful ones"
        raise InputError(f"--prompts {name}: {what}, as in jailbreakbench+{BENIGN}")
    return asked


def matched(part: str) -> bool:
    """Whether harmless partners are taken from Alpaca, by length: asked for, or because the set pairs nothing."""
    return part.endswith(f"+{BENIGN}") or not SETS[part].paired


def folder(name: str, model: str, wrappers: Path | None) -> Path:
    """Where the prompt set is kept that was made of public sets for one model and wrappers."""
    content = wrappers.read_bytes() if wrappers else b""
    key = hashlib.sha256(f"{name}\n{model}\n".encode() + content).hexdigest()[:12]
    return hub.own_cache() / "prompts" / f"{name.replace(',', '-').replace('+', '-')}-{key}"


def is_made(place: Path) -> bool:
    """Whether a prompt set's folder holds all that belongs to it."""
    return all((place / name).is_file() for name in FILES)


def load_rows(part: str) -> Rows:
    """The requests of one public set of `SETS`, by its name, perhaps with `+alpaca` behind it.

    Raises `InputError` for a set that cannot be loaded (gated, no network), that lacks a column, or whose harmful and
    harmless rows do not correspond.
    """
    name = part.removesuffix(f"+{BENIGN}")
    public = SETS[name]
    assert public.harmful is not None, "parse refuses a set without harmful requests"
    harmful = read_public_set(name, public, public.harmful)
    if matched(part) or public.harmless is None:
        return Rows(harmful, (None,) * len(harmful))
    harmless = read_public_set(f"{name}-harmless", public, public.harmless)
    return Rows(harmful, (_by_row if public.paired == "row" else _by_order)(harmful, harmless))


def read_public_set(name: str, public: PublicSet, part: Part) -> tuple[Request, ...]:
    """The requests of one kind, in the order of the set; rows keep their numbers in it."""
    table = _table(name, public, part)
    wanted = [public.text, *([public.category] if public.category else []), *part.where]
    if missing := [column for column in wanted if column not in table.column_names]:
        has = ", ".join(table.column_names)
        raise InputError(
            f"{public.repo} has no column {missing[0]!r} (it has {has}): the set has changed, so {CHANGED}"
        )
    found = []
    for row, entry in enumerate(table.select_columns(wanted)):
        turn = entry[public.text]
        turn = turn[0] if isinstance(turn, list) and turn else turn  # some sets hold a list of turns
        is_wanted = all(str(entry[column] or "") in values for column, values in part.where.items())
        if is_wanted and isinstance(turn, str) and turn.strip():
            category = str(entry[public.category] or "") if public.category else ""
            found.append(Request(name, row, category, turn.strip()))
    if not found:
        where = "".join(f", {column} {' or '.join(map(repr, values))}" for column, values in part.where.items())
        what = f"none of the {len(table)} rows of {public.repo} holds a request (column {public.text}{where})"
        raise InputError(f"{name}: {what}: the set has changed, so {CHANGED}")
    return tuple(found)


def _by_row(harmful: Sequence[Request], harmless: Sequence[Request]) -> tuple[Request, ...]:
    """The harmless request of the same row for each, after the check that both are as many and of the same categories."""
    kinds = [{(one.row, one.category) for one in side} for side in (harmful, harmless)]
    if differ := kinds[0] ^ kinds[1]:
        name, row = harmful[0].name, min(differ)[0]
        what = f"harmful and harmless rows do not correspond (row {row})"
        raise InputError(f"{name}: {what}; name {name}+{BENIGN} to take harmless partners by length")
    at = {request.row: request for request in harmless}
    return tuple(at[request.row] for request in harmful)


def _by_order(harmful: Sequence[Request], harmless: Sequence[Request]) -> tuple[Request | None, ...]:
    """For the i-th harmful request of a category the i-th harmless one; None where there is none left."""

    def kind(request: Request) -> str:
        category = request.category.removeprefix("contrast_")
        return ALIAS.get(category, category)

    waiting: dict[str, list[Request]] = defaultdict(list)
    for request in harmless:
        waiting[kind(request)].append(request)
    partners = tuple(waiting[kind(one)].pop(0) if waiting[kind(one)] else None for one in harmful)
    if not any(partners):
        raise InputError(f"{harmful[0].name}: no category has harmful and harmless requests; name it with +{BENIGN}")
    return partners


def unseen(rows: Rows, seen: set[str]) -> Rows:
    """The rows of which neither side was `seen` (by `Request.same`); what they hold is added to `seen`.

    Topics are drawn as if independent, so one request may not stand in two of them.
    """
    kept = []
    for one, other in zip(rows.harmful, rows.harmless, strict=True):
        keys = {one.same} | ({other.same} if other else set())
        if not keys & seen:
            kept.append((one, other))
            seen |= keys
    return Rows(tuple(one for one, _ in kept), tuple(other for _, other in kept))


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """The cluster of each text, numbered in the order of their first texts: two are in one if they, or a chain of others
    between them, share `OVERLAP` of their words (common words over all words of both).

    >>> near_duplicates(["write a poem on rain", "Write a poem on snow!", "sing"])
    [0, 0, 1]
    """
    import numpy as np
    import pandas as pd
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(binary=True, token_pattern=r"\w+", dtype=np.int32).fit_transform(texts)
    n_words = words.sum(axis=1)
    links: list[np.ndarray] = []
    for start in range(0, len(texts), BLOCK):
        common = (words[start : start + BLOCK] @ words.T).toarray()
        either = n_words[start : start + BLOCK, None] + n_words - common
        rows, columns = np.nonzero(common >= OVERLAP * np.maximum(either, 1))
        links.append(np.stack([rows + start, columns]))
    one, other = np.hstack(links)
    graph = coo_array((np.ones(len(one), dtype=bool), (one, other)), shape=(len(texts), len(texts)))
    return list(pd.factorize(connected_components(graph, directed=False)[1])[0].tolist())


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
        raise InputError(f"{public.repo} has no split {part.split!r} (it has {', '.join(found)}): {CHANGED}")
    return found[part.split or next(iter(found))]


def _explain(name: str, public: PublicSet, error: Exception) -> InputError:
    """One sentence for an error of `datasets`, which hides the hub's answer behind an error of its own."""
    from huggingface_hub import errors as hub_errors

    hidden, what = error.__cause__ or error, f"{name} ({public.repo}, {public.access})"
    if "gated" in str(error).lower() or isinstance(hidden, hub_errors.GatedRepoError):
        page = f"huggingface.co/datasets/{public.repo}"
        return InputError(f"{name} is gated: accept its terms at {page} with your account, then {hub.TOKEN_HELP}")
    if hub.is_network(error) or hub.is_network(hidden):
        return InputError(
            f"{what} is not in the cache and the hub cannot be reached: connect, unset HF_HUB_OFFLINE and "
            "HF_DATASETS_OFFLINE, or name in HF_HOME the cache of a machine that has it"
        )
    if isinstance(hidden, hub_errors.HfHubHTTPError):
        return hub.explain(hub.HubId(public.repo), hidden, "data set")
    if "scripts are no longer supported" in str(hidden):
        why = "is read by a script of its own, which the library datasets runs no more"
        return InputError(f"{what} {why}: name another set")
    return InputError(
        f"{what} could not be loaded ({type(hidden).__name__}): {hub.AGAIN}; if it fails again, is its name still that, does "
        f"it hold rows, and do you have access? If it is gated, {hub.TOKEN_HELP}"
    )


# ---- partners of equal length ----


def partner_pairs(rows: Rows) -> list[tuple[Request, Request]]:
    """Harmful requests with their partners, where they have one of another text."""
    both = zip(rows.harmful, rows.harmless, strict=True)
    return [(one, other) for one, other in both if other is not None and one.text != other.text]


def grouped(rows: Rows, tokenizer: PreTrainedTokenizerBase, name: str, report: Callable[[str], object]) -> Rows:
    """The same rows where enough of them have equal length; else every harmful request has a harmless one of its length.

    Effects are then those of the two groups, and include all in which their members differ.
    """
    own = sum(_length(one, tokenizer) == _length(other, tokenizer) for one, other in partner_pairs(rows))
    if own >= FEW * len(rows.harmful):
        return rows
    drawn = with_partners(rows, by_length(filter(None, rows.harmless), tokenizer), tokenizer)
    n_drawn = len(partner_pairs(drawn))
    if n_drawn <= own:
        return rows
    report(
        f"{name}: {own} of {len(rows.harmful)} rows have the length of their own partner, so groups are interchanged: T1 "
        f"takes a partner of equal length from all harmless rows of the set ({n_drawn} pairs)"
    )
    return drawn


def _length(request: Request, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the rendered prompt."""
    from companion.prompts import tokens

    return len(tokens.encode(tokenizer, request.text)[0])


def by_length(requests: Iterable[Request], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[Request]]:
    """Requests by the length of their rendered prompt in this model's tokens, each list in a fixed random order."""
    found: dict[int, list[Request]] = defaultdict(list)
    for request in requests:
        found[_length(request, tokenizer)].append(request)
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
        waiting = benign.get(_length(request, tokenizer), [])
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
    from companion.prompts import tokens

    usable = Counter(pair.treatment for pair in made if tokens.token_pair(pair, tokenizer)[0] is not None)
    asked = {"T1": n_requests} | dict(sorted(Counter(p.treatment for p in made if p.treatment != "T1").items()))
    lines = []
    for treatment, n in asked.items():
        what, few = "pairs have equal token length", "lengthen the neutral template until both have equally many tokens"
        if treatment == "T1":
            what = "requests have a benign partner of their length"
            few = f"take harmless partners by length (+{BENIGN}), or sets with more rows"
        line = f"{treatment}: {usable[treatment]} of {n} {what} and can be interchanged"
        lines.append(line + (f"; few: {few}" if usable[treatment] < FEW * n else ""))
    return lines


# ---- wrappers ----


@dataclass(frozen=True)
class Wrapper:
    """A user's pair of templates with one slot for the request; `family` names the kind of jailbreak. None come with us.

    The two must have equally many tokens, since an interchange needs equal lengths.
    """

    family: str
    neutral: str
    jailbreak: str

    def around(self, request: str) -> tuple[str, str]:
        """The request in both templates, whatever braces it holds."""
        return self.neutral.replace(SLOT, request), self.jailbreak.replace(SLOT, request)


def wrappers_file(place: Path) -> Path:
    """The file of a `--wrappers` flag: itself, or `wrappers.jsonl` in the folder named."""
    file = place / WRAPPERS if place.is_dir() else place
    if not file.is_file():
        raise InputError(f"--wrappers {place}: expected a file of JSON lines, or a folder with {WRAPPERS}")
    return file


def read_wrappers(place: Path) -> tuple[Wrapper, ...]:
    """All wrappers of a file or folder; `InputError` names file and line of the first mistake, and shows no template."""
    file = wrappers_file(place)
    lines = read_utf8(file).split("\n")
    found = tuple(_wrapper(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not found:
        raise InputError(f"{file}: no wrappers; one JSON object a line is expected, with {', '.join(FIELDS)}")
    families = [wrapper.family for wrapper in found]
    if len(set(families)) < len(families):
        raise InputError(f"{file}: two wrappers are of one family; give each a name of its own")
    return found


def _wrapper(line: str, where: str) -> Wrapper:
    try:
        row = parse_json(line)
    except BrokenJson as error:
        raise InputError(f"{where}: broken JSON ({error.reason})") from None
    if not isinstance(row, dict) or set(row) != set(FIELDS) or not all(isinstance(row[name], str) for name in FIELDS):
        raise InputError(f"{where}: expected an object with the strings {', '.join(FIELDS)}, and nothing else")
    for name in ("neutral", "jailbreak"):
        if (times := row[name].count(SLOT)) != 1:
            raise InputError(f"{where}: '{name}' must hold the slot {SLOT} exactly once, not {times} times")
    if row["neutral"] == row["jailbreak"] or not row["family"].strip():
        raise InputError(f"{where}: 'family' must be named, and the two templates must differ")
    return Wrapper(*(row[name] for name in FIELDS))
