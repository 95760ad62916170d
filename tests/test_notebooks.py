"""What every notebook must hold to: executed, short, built on the face alone, few compared outputs, no place of one machine."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from companion.base.paths import NOTEBOOKS, ROOT
from companion.run import notebooks, runner

BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
IGNORED = {"nbval-ignore-output", "nbval-skip", "raises-exception"}
book = pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])


def code(path: Path) -> list[dict[str, Any]]:
    return notebooks.code_cells(notebooks.read_notebook(path))


def shown(cell: dict[str, Any]) -> str:
    """All text that a cell's outputs show, without images."""
    texts = [out.get("text", "") for out in cell["outputs"]]
    texts += [text for out in cell["outputs"] for kind, text in out.get("data", {}).items() if kind.startswith("text")]
    return "".join("".join(text) for text in texts)


def printed(source: str, *options: str) -> list[str]:
    return subprocess.check_output([sys.executable, *options, "-c", source], cwd=ROOT, text=True).split()


@book
def test_a_notebook_was_executed_with_the_runners_parameters_and_fixed_ids(path: Path) -> None:
    notebook = notebooks.read_notebook(path)
    assert notebooks.is_executed(notebook), f"run ./run_all.sh --only {path.stem}"
    assert notebooks.notebook_parameters(notebook) == runner.DEFAULTS
    ids = [cell.get("id") for cell in notebook["cells"]]
    assert None not in ids and len(set(ids)) == len(ids)


def prose(path: Path) -> tuple[str, str]:
    """The running text of a notebook, and its exercises."""
    cells = [cell for cell in notebooks.read_notebook(path)["cells"] if cell["cell_type"] == "markdown"]
    texts = {False: "", True: ""}
    for cell in cells:
        texts[any(tag.startswith("exercise") for tag in notebooks.tags(cell))] += notebooks.source(cell) + "\n\n"
    return texts[False], texts[True]


@book
def test_a_lesson_is_short_and_its_method_can_be_read(path: Path) -> None:
    sources = [notebooks.source(cell) for cell in code(path)]
    lengths = sorted(sum(bool(line.strip()) for line in source.splitlines()) for source in sources)
    assert lengths[-1] <= 25 and lengths[len(lengths) // 2] <= 6, lengths
    text, exercises = (re.sub(r"(?s)```.*?```|<!--.*?-->", "", one) for one in prose(path))
    inside = " ".join(re.findall(r"(?s)<details>.*?</details>", text))
    n_words, n_inside, n_exercises = (len(one.split()) for one in (text, inside, exercises))
    assert n_words - n_inside <= (3_000 if path.name[:2] in ("04", "05", "06", "07") else 2_000)
    assert n_inside + n_exercises <= 600
    assert not re.search(r"(?m)^\s*if (ready|whole)|not computed", "\n".join(sources))
    assert path.stat().st_size < 1_000_000


@book
def test_a_lesson_imports_the_face_alone_and_few_names_of_it(path: Path) -> None:
    tree = ast.parse("\n".join(notebooks.source(cell) for cell in code(path)))
    own = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    houses = {str(node.module).partition(".")[0] for node in own}
    assert not houses & {"companion", "organisms", "exercises"}, "compose it in helpers/"
    names = [alias.name for node in own if str(node.module).startswith("helpers") for alias in node.names]
    assert len(names) <= 8, names


@book
def test_every_section_of_a_lesson_ends_with_its_answer(path: Path) -> None:
    sections = re.split(r"(?m)^## ", re.sub(r"(?s)<details>.*?</details>", "", prose(path)[0]))[1:]
    ends = [part.partition("**Next →**")[0].strip().rsplit("\n\n", 1)[-1] for part in sections]
    assert not [end[:80] for end in ends if "**" not in end]


@book
def test_no_assertion_in_a_notebook_can_end_a_users_run(path: Path) -> None:
    """What must hold is asked by `companion.base.display.check`, which shows what does not and goes on."""
    for cell in code(path):
        tree = ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", notebooks.source(cell)))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], notebooks.source(cell)


@book
def test_a_notebook_has_one_to_five_outputs_that_nbval_compares(path: Path) -> None:
    """Of cells whose outputs are more than drawings."""
    compared = [cell for cell in code(path) if not IGNORED & set(notebooks.tags(cell))]
    checked = [notebooks.source(cell) for cell in compared if re.sub(r"<Figure[^>]*>", "", shown(cell)).strip()]
    assert 1 <= len(checked) <= 5, "\n---\n".join(checked)


@book
def test_a_notebook_names_no_place_of_one_machine(path: Path) -> None:
    sources = map(notebooks.source, notebooks.read_notebook(path)["cells"])
    whole = "\n".join([*sources, *map(shown, code(path))])
    places = [str(ROOT), str(Path.home()), "/.state/", " at 0x"]
    assert not [place for place in places if len(place) > 1 and place in whole]
    assert not re.findall(r"(?<![\w.:/-])/(?:home|Users|tmp|mnt|private|var)/\S*", whole)


def test_the_notebook_that_only_reads_results_imports_no_model_stack() -> None:
    (path,) = NOTEBOOKS.glob("08_*.ipynb")
    tree = ast.parse("\n".join(re.sub(r"(?m)^\s*[%!].*$", "", notebooks.source(cell)) for cell in code(path)))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    probe = "print(*{'torch', 'transformers', 'transformer_lens'} & set(sys.modules))"
    assert printed("\n".join([*imports, "import sys", probe])) == []


def test_the_command_line_imports_the_standard_library_only() -> None:
    probe = "import companion.run.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    found = printed(f"import sys; sys.path.insert(0, '.'); {probe}", "-I", "-S")
    assert {name for name in found if name not in sys.stdlib_module_names} <= {"companion", "__main__"}


def test_plain_papermill_runs_a_notebook_after_the_one_that_it_needs(tmp_path: Path) -> None:
    """As a user would type it, from the repository's root, without this project's own runner."""
    places = {"COMPANION_RESULTS": str(tmp_path / "results"), "COMPANION_FIGURES": str(tmp_path / "figures")}
    variables = os.environ | places | {"OMP_NUM_THREADS": "1"}
    asked = ["-p", "PROFILE", "smoke", "-k", "python3", "--no-progress-bar"]
    asked += [word for name in ("MODEL", "PROMPTS", "SLUG") for word in ("-p", name, "embedded")]
    for name in ("01_data_prep", "02_layers"):
        files = [f"notebooks/{name}.ipynb", str(tmp_path / f"{name}.ipynb")]
        command = [sys.executable, "-m", "papermill", *files, *asked]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "results" / "embedded" / "02_treatments.csv").is_file()


def test_every_notebook_has_its_place() -> None:
    assert {path.name.partition("_")[0] for path in BOOKS} == set(runner.NEEDS)
    order = list(runner.find_notebooks())
    assert all(order.index(need) < order.index(number) for number in order for need in runner.NEEDS[number])
    assert order[-1] == "00"
