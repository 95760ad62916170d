"""What every notebook must hold to: executed, short cells, mostly prose, few compared outputs, no place of one machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from companion.base.paths import NOTEBOOKS, ROOT
from companion.run import notebooks, runner

BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
ONLY_PLOT = ("00", "08")  # these read result files and must not import the model stack
MODEL_STACK = ("torch", "transformers", "transformer_lens")
IGNORED = ("nbval-ignore-output", "nbval-skip", "raises-exception")

book = pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])


def code(path: Path) -> list[dict[str, Any]]:
    return notebooks.code_cells(notebooks.read_notebook(path))


def shown(cell: dict[str, Any]) -> str:
    """All text that a cell's outputs show, without images."""
    texts = [out.get("text", "") for out in cell["outputs"]]
    texts += [text for out in cell["outputs"] for kind, text in out.get("data", {}).items() if kind.startswith("text")]
    return "".join("".join(text) for text in texts)


def is_checked(cell: dict[str, Any]) -> bool:
    """Whether nbval compares an output of this cell that is more than a drawing."""
    return bool(re.sub(r"<Figure[^>]*>", "", shown(cell)).strip()) and not set(notebooks.tags(cell)) & set(IGNORED)


@book
def test_a_notebook_was_executed_top_to_bottom(path: Path) -> None:
    assert notebooks.is_executed(notebooks.read_notebook(path)), f"run ./run_all.sh --only {path.name[:2]}"


@book
def test_a_notebook_has_the_runners_parameters(path: Path) -> None:
    assert notebooks.notebook_parameters(notebooks.read_notebook(path), path) == runner.DEFAULTS


@book
def test_a_notebook_is_mostly_prose_in_short_cells(path: Path) -> None:
    sources = [notebooks.source(cell) for cell in code(path)]
    longest = max(sources, key=lambda source: sum(bool(line.strip()) for line in source.splitlines()))
    assert sum(bool(line.strip()) for line in longest.splitlines()) <= 25, longest
    prose = [
        notebooks.source(cell) for cell in notebooks.read_notebook(path)["cells"] if cell["cell_type"] == "markdown"
    ]
    words, lines = (
        sum(map(len, map(split, texts))) for split, texts in ((str.split, prose), (str.splitlines, sources))
    )
    assert words / lines >= 5
    assert path.stat().st_size < 1_000_000


@book
def test_a_notebook_has_one_to_five_outputs_that_nbval_compares(path: Path) -> None:
    checked = [notebooks.source(cell) for cell in code(path) if is_checked(cell)]
    assert 1 <= len(checked) <= 5, "\n---\n".join(checked)


@book
def test_a_notebook_names_no_place_of_one_machine(path: Path) -> None:
    whole = "\n".join(
        [*(notebooks.source(cell) for cell in notebooks.read_notebook(path)["cells"]), *map(shown, code(path))]
    )
    places = [str(ROOT), str(Path.home()), "/.state/", " at 0x"]
    assert not [place for place in places if len(place) > 1 and place in whole]
    assert not re.findall(r"(?<![\w.:/-])/(?:home|Users|tmp|mnt|private|var)/\S*", whole)


@book
def test_a_notebooks_cells_have_fixed_ids(path: Path) -> None:
    ids = [cell.get("id") for cell in notebooks.read_notebook(path)["cells"]]
    assert None not in ids and len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", [path for path in BOOKS if path.name[:2] in ONLY_PLOT], ids=lambda path: path.stem)
def test_a_notebook_that_only_plots_imports_no_model_stack(path: Path) -> None:
    tree = ast.parse("\n".join(re.sub(r"(?m)^\s*[%!].*$", "", notebooks.source(cell)) for cell in code(path)))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not imported_stack("\n".join(imports))


def imported_stack(source: str) -> list[str]:
    """Which of the model stack is loaded after running the source in a new process."""
    probe = f"{source}\nimport sys\nprint(*(name for name in {MODEL_STACK} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_figures_are_redrawn_without_the_model_stack() -> None:
    assert imported_stack("import companion.plots.figures") == []


def test_the_command_line_imports_the_standard_library_only() -> None:
    probe = "import companion.run.cli, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {probe}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    foreign = {name for name in done.stdout.split() if name not in sys.stdlib_module_names}
    assert foreign <= {"companion", "__main__"}


def test_every_notebook_has_its_place() -> None:
    assert {path.name[:2] for path in BOOKS} == set(runner.NEEDS)
    order = list(runner.find_notebooks(NOTEBOOKS, runner.NEEDS))
    assert all(order.index(need) < order.index(number) for number in order for need in runner.NEEDS[number])
    assert order[-1] == "00"


def test_what_a_notebook_needs_comes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "NEEDS", {"01": (), "02": ("01",), "03": ("01",), "08": ("02", "03")})
    paths = dict.fromkeys(runner.NEEDS, ROOT)
    assert runner.with_needs(["02"], paths) == ["01", "02"]
    assert runner.with_needs(["08"], paths) == ["01", "02", "03", "08"]
