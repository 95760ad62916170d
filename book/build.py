"""`./run_all.sh --book`: the notebooks and the documents as a website, from their stored outputs, offline.

Sphinx lives in an environment of its own (`.venv-book`), so that the lock stays what the notebooks need. Links are checked
twice: by Sphinx while it reads, and here in the pages that it wrote.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from companion.base.errors import InputError
from companion.base.paths import ROOT, relative

PLACE = ROOT / ".book"
VENV = ROOT / ".venv-book"
ASKED = ROOT / "requirements-book.in"
# What becomes a page, and what pages show or link to.
PAGES = (
    "README.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "models.example.yml", "docs/*.md", "notebooks/*.ipynb",
    "exercises/README.md", "exercises/[0-9]*.ipynb", "exercises/*.py", "data/**/README.md", "figures/INDEX.md",
    "figures/smollm2-refuser/*", "figures/benchmarks/*", "results/claims.md", "results/benchmarks/*.csv",
)  # fmt: skip


def build() -> int:
    """Make the book; exit status 1 if Sphinx warns or a link leads nowhere."""
    python = environment()
    source, html = PLACE / "source", PLACE / "html"
    stage(source)
    shutil.rmtree(html, ignore_errors=True)
    command = [str(python), "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(source), str(html)]
    failed = subprocess.run(command, check=False).returncode
    broken = list(broken_links(html))
    print("\n".join([*broken, f"book: {relative(html / 'index.html')}; {len(broken)} broken links"]))
    return 1 if failed or broken else 0


def environment() -> Path:
    """The Python of `.venv-book`, filled from `requirements-book.in` if that is new or changed."""
    python, stamp = VENV / "bin" / "python", VENV / "asked.sha256"
    digest = hashlib.sha256(ASKED.read_bytes()).hexdigest()
    if not stamp.is_file() or stamp.read_text() != digest:
        print(f"Installing {ASKED.name} into {VENV.name}, once: about a minute.", flush=True)
        venv.create(VENV, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(ASKED)]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"the packages of {ASKED.name} could not be installed; is there a network?")
        stamp.write_text(digest)
    return python


def stage(source: Path) -> None:
    """Copy what the book is made of, in the folders that it has in the repository, so that relative links hold."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "book", source)
    for path in sorted({path for pattern in PAGES for path in ROOT.glob(pattern) if path.is_file()}):
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


class Page(HTMLParser):
    """The ids and the targets of links and images of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag names and where it leads."""
        found = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        self.targets += [value for name in ("href", "src") if (value := found.get(name)) and tag != "link"]


def broken_links(html: Path) -> Iterator[str]:
    """One line for each local link, image or script of a page that leads nowhere, or that would ask the web to show it."""
    files = [path for path in html.rglob("*.html") if "_static" not in path.parts]
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in files}
    for path, page in sorted(pages.items()):
        for target in dict.fromkeys(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_place = not parts.fragment or other not in pages or unquote(parts.fragment) in pages[other].ids
            if not (other.exists() and is_place):
                yield f"{path.relative_to(html.resolve())}: {target} leads nowhere"


if __name__ == "__main__":
    sys.exit(build())
