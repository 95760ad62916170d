"""Rows of public prompt sets, read on the user's machine through the `datasets` library.

Texts stay in memory and in the user's cache. Errors name columns and row numbers, never a text.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from helpers import hub_fetch
from helpers.errors import InputError
from helpers.hub import HubId
from helpers.public_list import BENIGN, SETS, Part, PublicSet, matched

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
    """The requests of one public set (`helpers.public_list.SETS`), by its name, perhaps with `+alpaca` behind it.

    Raises InputError for a set that cannot be loaded (gated, no network), that lacks a column, or whose harmful and
    harmless rows do not correspond.
    """
    name = part.removesuffix(f"+{BENIGN}")
    public = SETS[name]
    assert public.harmful is not None, "public_list.parse refuses a set without harmful requests"
    harmful = read(name, public, public.harmful)
    if matched(part):
        return Rows(harmful, (None,) * len(harmful))
    assert public.harmless is not None, "a set that pairs its rows has both kinds"
    harmless = read(f"{name}-harmless", public, public.harmless)
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


def read(name: str, public: PublicSet, part: Part) -> tuple[Request, ...]:
    """The requests of one kind, in the order of the set; rows keep their numbers in it."""
    table = _table(name, public, part)
    wanted = [public.text, *([public.category] if public.category else []), *part.where]
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise InputError(
            f"{public.repo} has no column {missing[0]!r} (it has {', '.join(table.column_names)}): the set has changed, "
            "so adapt its line in helpers/public_list.py"
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
            "has changed, so adapt its line in helpers/public_list.py"
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
            f"{public.repo} has no split {part.split!r} (it has {', '.join(found)}): adapt helpers/public_list.py"
        )
    return found[part.split or next(iter(found))]


def _explain(name: str, public: PublicSet, error: Exception) -> InputError:
    """`datasets` hides the hub's answer behind an error of its own, so its words are read where its kind says nothing."""
    hidden = error.__cause__ or error
    is_gated = "gated" in str(error).lower() or isinstance(hidden, hub_fetch.hub_errors.GatedRepoError)
    if is_gated:
        page = f"huggingface.co/datasets/{public.repo}"
        return InputError(f"{name} is gated: accept its terms at {page} with your account, then {hub_fetch.TOKEN_HELP}")
    if hub_fetch.is_network(error) or hub_fetch.is_network(hidden):
        return InputError(
            f"{name} ({public.repo}) is not in the cache and the hub cannot be reached: connect, unset HF_HUB_OFFLINE and "
            "HF_DATASETS_OFFLINE, or name in HF_HOME the cache of a machine that has it"
        )
    if isinstance(hidden, hub_fetch.hub_errors.HfHubHTTPError):
        return hub_fetch.explain(HubId(public.repo), hidden, "data set")
    if isinstance(hidden, RuntimeError) and "scripts are no longer supported" in str(hidden):
        return InputError(
            f"{name} ({public.repo}) is read by a script of its own, which the installed library datasets runs no more: name "
            "another set, or adapt its line in helpers/public_list.py to a copy of its rows"
        )
    if isinstance(hidden, RuntimeError):
        return InputError(
            f"the transfer of {name} ({public.repo}) broke off ({type(hidden).__name__}): {hub_fetch.AGAIN}"
        )
    return InputError(
        f"{name} ({public.repo}, {public.access}) could not be loaded ({type(error).__name__}): is its name still that, "
        f"does it hold rows, and do you have access? If it is gated, {hub_fetch.TOKEN_HELP}"
    )


def _category(columns: dict[str, Any], public: PublicSet, row: int) -> str:
    return str(columns[public.category][row] or "") if public.category else ""


def _text(value: Any) -> str:
    """The user's turn; some sets hold a list of turns, of which the first counts."""
    first = value[0] if isinstance(value, list) and value else value
    return first.strip() if isinstance(first, str) else ""
