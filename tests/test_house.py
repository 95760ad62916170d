"""What every file and notebook of the repository must hold to, and that all say the same about versions."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from companion.base.paths import NOTEBOOKS, ROOT
from companion.run import checks, freshness, notebooks, runner

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


@pytest.mark.parametrize(
    "path",
    sorted(
        [path for name in ("helpers", "companion", "organisms", "exercises") for path in ROOT.glob(f"{name}/**/*.py")]
    ),
    ids=lambda path: path.stem,
)
def test_a_helper_is_one_topic(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250, "which two topics are in it?"
    assert ast.get_docstring(ast.parse(text)), "say in its first line what it is for"
    public = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [node.name for node in public if node.name[0] != "_" and not ast.get_docstring(node)]


def own_files() -> list[Path]:
    """Text files of the repository, without environments, caches and what a run makes."""
    kinds = (".py", ".md", ".sh", ".toml", ".yml", ".cff", ".in")
    below = [
        path
        for folder in ("helpers", "companion", "organisms", "exercises", "tests", "benchmarks", ".ci")
        for path in (ROOT / folder).rglob("*")
    ]
    return [path for path in (*below, *ROOT.glob("*")) if path.suffix in kinds and path.is_file()]


def test_nothing_is_left_unfinished_or_tied_to_a_machine() -> None:
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"]) + r")\b")
    found = [path.name for path in own_files() if marks.search(path.read_text(encoding="utf-8"))]
    assert not found
    homes = [str(ROOT) + "/", str(Path.home()) + "/"]
    assert not [path for path in own_files() for home in homes if home in path.read_text(encoding="utf-8")]


def test_there_is_no_pickle() -> None:
    paths = [
        path
        for folder in ("data", "results", "helpers", "companion", "organisms", "tests")
        for path in (ROOT / folder).rglob("*")
    ]
    assert not [path for path in paths if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_conda_and_pip_install_the_same() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip", {"pip": ["-r requirements.lock"]}]


def test_the_lock_holds_what_is_asked_for_and_nothing_else_names_versions() -> None:
    asked = freshness.requirement_names(ROOT / "requirements.in")
    assert set(map(checks.canonicalize_name, asked)) <= set(checks.pins())
    lines = (ROOT / "requirements.in").read_text().splitlines()
    assert not [line for line in lines if re.search(r"[=<>~]", line.split("#")[0])]


def test_the_lock_is_what_its_recipe_leaves() -> None:
    lines = checks.LOCK.read_text().splitlines()
    assert checks.locked(lines) == lines
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^\s+]+( ; .+)?", line) for line in lines)


def test_what_is_installed_is_what_is_locked() -> None:
    assert sys.version_info[:2] == (3, 11)
    assert checks.disagreements(checks.pins()) == []
    assert checks.disagreements({"numpy": "0.1", "no-such": "1"})[1] == "no-such is missing, locked 1"


def test_the_citation_is_valid() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2604.11663"
    assert "MIT License" in (ROOT / "LICENSE").read_text()


def _committed(folder: Path, value: float, processor: str) -> None:
    (folder / "embedded").mkdir(parents=True)
    (folder / "embedded" / "02_a.csv").write_text(f"site,te\nhead,{value}\n")
    (folder / "embedded" / "manifest.json").write_text(json.dumps({"processor": processor}))


def test_committed_tables_are_compared_with_a_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "RESULTS", tmp_path / "old")
    for folder, value in (("old", 1.0), ("new", 1.0005), ("far", 1.01)):
        _committed(tmp_path / folder, value, freshness.processor())
    assert checks.compare(tmp_path / "new")[1]
    assert not checks.compare(tmp_path / "far")[1]
    (tmp_path / "new" / "embedded" / "02_a.csv").unlink()
    assert not checks.compare(tmp_path / "new")[1]


def test_on_another_processor_the_verdicts_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "RESULTS", tmp_path / "old")
    claims = {"old": "supported", "same": "supported", "other": "contradicted"}
    for value, (folder, verdict) in enumerate(claims.items()):
        _committed(tmp_path / folder, value, "a processor of long ago")
        row = {"model": "embedded", "claim": "C1", "verdict": verdict}
        (tmp_path / folder / "embedded" / "claims.json").write_text(json.dumps([row]))
    assert checks.compare(tmp_path / "same")[1]
    assert not checks.compare(tmp_path / "other")[1]
