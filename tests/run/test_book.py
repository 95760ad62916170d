"""The book: what it is made of, and that its links are looked at."""

import re
from pathlib import Path

from book import build
from companion.base.paths import NOTEBOOKS, ROOT


def site(folder: Path, body: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "other.html").write_text("<p id='here'>x</p>")
    (folder / "index.html").write_text(body)
    return list(build.broken_links(folder))


def test_links_that_lead_nowhere_are_named_and_no_others(tmp_path: Path) -> None:
    for target in ("other.html", "other.html#here", "#top", "https://example.org/x", "mailto:a@b"):
        assert site(tmp_path, f"<a id='top' href='{target}'>x</a>") == []
    for target in ("none.html", "other.html#there", "#bottom", "../outside/none.png"):
        for link in (f"<a href='{target}'>x</a>", f"<img src='{target}'>"):
            assert site(tmp_path, link) == [f"index.html: {target} leads nowhere"]


def test_every_document_has_its_page(tmp_path: Path) -> None:
    build.stage(tmp_path / "source")
    assert all((tmp_path / "source" / "notebooks" / path.name).is_file() for path in NOTEBOOKS.glob("*.ipynb"))
    listed = (tmp_path / "source" / "index.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{path.stem}" in listed, f"put docs/{path.stem} into book/index.md"
    assert (tmp_path / "source" / "results" / "claims.md").read_text(encoding="utf-8").startswith("# ")


def test_the_book_asks_nothing_of_the_web() -> None:
    settings = (ROOT / "book" / "conf.py").read_text(encoding="utf-8")
    assert 'nb_execution_mode = "off"' in settings and "http" not in settings
    assert re.search(r'^mathjax_path = "MathJax', settings, re.M)
