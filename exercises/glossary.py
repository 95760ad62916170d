"""Link the first use of every term in a notebook to the glossary, `docs/glossary.md`, which is the list of terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from companion.base.paths import ROOT
from companion.run import notebooks

GLOSSARY = ROOT / "docs" / "glossary.md"
LINK = "../docs/glossary.md#"
_OWN = re.compile(rf"\[([^\]]+)\]\({re.escape(LINK)}[^)]*\)")
# Where a term is not prose: code, formulas, links, tags, headings, rows of tables.
_CLOSED = re.compile(
    r"```.*?```|\$\$.*?\$\$|`[^`]*`|\$[^$\n]+\$|\[[^\]]*\]\([^)]*\)|<[^>\n]+>|^#[^\n]*$|^\|[^\n]*$", re.S | re.M
)


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub and MyST make it.

    >>> anchor("Moran's I"), anchor("Max-t band")
    ('morans-i', 'max-t-band')
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def terms() -> dict[str, tuple[str, ...]]:
    """Anchor -> the words that stand for the term in running text, longest first."""
    text = GLOSSARY.read_text(encoding="utf-8")
    found = re.findall(r"^### (.+)\n\*also: (.+)\*$", text, re.M)
    return {anchor(name): tuple(sorted(words.split(", "), key=len, reverse=True)) for name, words in found}


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, words))})(?![\w-])", re.IGNORECASE)


def first_use(text: str, words: Sequence[str]) -> re.Match[str] | None:
    """Where one of the words first stands in prose.

    >>> first_use("`patch` and a patch", ["patch"]).start()
    14
    """
    closed = [found.span() for found in _CLOSED.finditer(text)]
    uses = _pattern(words).finditer(text)
    return next((use for use in uses if not any(low <= use.start() < high for low, high in closed)), None)


def linked(cells: Sequence[notebooks.Cell]) -> list[notebooks.Cell]:
    """The cells with each term linked where prose first uses it; earlier links are dropped. Exercises are left alone."""
    texts = [_OWN.sub(r"\1", notebooks.source(one)) for one in cells]
    prose = [
        place
        for place, one in enumerate(cells)
        if one["cell_type"] == "markdown" and not any(tag.startswith("exercise") for tag in notebooks.tags(one))
    ]
    for name, words in terms().items():
        for place in prose:
            use = first_use(texts[place], words)
            if use:
                target = f"[{use.group()}]({LINK}{name})"
                texts[place] = texts[place][: use.start()] + target + texts[place][use.end() :]
                break
    changed = [{**one, "source": text.splitlines(keepends=True)} for one, text in zip(cells, texts, strict=True)]
    return [new if place in prose else old for place, (old, new) in enumerate(zip(cells, changed, strict=True))]
