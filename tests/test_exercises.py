"""The exercises and open questions: solutions, checks that name the likely mistake, and keys that follow from the making."""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import beta

import exercises
from companion.base.errors import InputError
from companion.base.paths import NOTEBOOKS
from companion.base.thresholds import EARLY, LATE, depth
from companion.mediation import estimands, outcomes, study
from companion.mediation.study import Study
from companion.neurons import single
from companion.prompts import pairs
from companion.run import notebooks
from exercises import build, glossary, guide, mystery, numbers
from exercises.judging import NUMBERS, Exercise, find, judge, of_notebook
from exercises.questions import QUESTIONS
from organisms import compiled

# ---- exercises ----

EXERCISES = [one for number in NUMBERS for one in of_notebook(number)]
each = pytest.mark.parametrize("one", EXERCISES, ids=lambda one: one.number)
each_notebook = pytest.mark.parametrize("number", NUMBERS)
CODES = range(6)


def notebook_of(number: str) -> Path:
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    return path


@each
def test_the_solution_is_right_and_stands_alone(one: Exercise) -> None:
    assert judge(one, one.solution) == ""
    names: dict[str, Any] = {"np": np, "torch": torch, "math": math, "Callable": Callable, "beta": beta}
    exec(inspect.getsource(one.solution), names)
    assert judge(one, names[one.solution.__name__]) == "", "a reader of the folded solution cannot run it"


@each
def test_typical_mistakes_are_named_and_told_from_an_empty_answer(one: Exercise) -> None:
    assert len({mistake.says for mistake in one.mistakes}) == len(one.mistakes) >= 3
    for mistake in one.mistakes:
        assert judge(one, mistake.answer) == mistake.says
    assert "empty" in judge(one, lambda *args: None) and "TypeError" in judge(one, lambda: 1)


INDEPENDENT: list[tuple[str, Callable[..., Any], str]] = [
    ("01-2", lambda z, c, r: torch.log_softmax(z, -1)[:, -2, c].exp().sum(1).log()
        - torch.log_softmax(z, -1)[:, -2, r].exp().sum(1).log(), "position is off by one"),
    ("01-2", lambda z, c, r: torch.logit(z.softmax(-1)[:, -1, c].sum(-1)), "against *refusing*"),
    ("02-2", lambda nie, te: abs(nie).mean() / abs(te).mean(), "absolute values"),
    ("03-2", lambda m, d, t: np.mean(m[d > 0]), "components were counted"),
    ("03-3", lambda z, o, h, n: o.reshape(len(o), -1, n)[:, h] @ z.reshape(-1, n)[h], "as wide as there are heads"),
    ("04-2", lambda s: next((k + 1 for k in range(len(s)) if (abs(s[k:] - 1) < 0.1 + 1e-9).all()), None), "of k itself"),
    ("04-3", lambda g, u, d, o: (g[o], u[o], torch.stack([d[:, i] for i in range(3)], 1)), "indices permuted"),
    ("05-1", lambda c, t, g, n: torch.where(torch.tensor([x == n for x in g]), t, c), "the input was"),
    ("06-3", lambda p, j, s: 1 - abs((p - s).mean() / (p - j).mean()), "sign of the gap"),
    ("06-2", lambda f, r: (np.sum(abs(r) >= abs(f)) + 1) / (r.size + 1), "two-sided"),
    ("07-1", lambda t, v: np.mean([s != "contradicted" for b, s in zip(t, v, strict=True) if b is False]), "no answer"),
    ("08-2", lambda v, c: "inconclusive" if "failed" in c.values() else v, "two things"),
    ("08-1", lambda e, t: np.std(e, ddof=1) / 3, "pairs were the unit"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer", "says"), INDEPENDENT)
def test_the_same_mistake_in_other_words_is_named_too(number: str, answer: Callable[..., Any], says: str) -> None:
    assert says in judge(find(number), answer)


def test_what_is_no_typical_mistake_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a result of shape (2,), got a result of shape (2, 3, 5)" in judge(find("01-2"), lambda z, c, r: z)
    assert "keys TE, NIE0, NIE1, INT, got a tuple of 4" in judge(find("00-1"), lambda *four: four)
    k90 = find("04-2")
    assert "the answer is None, yours is 7" in judge(k90, lambda s: 7 if s[-1] < 0 else k90.solution(s))
    shown = judge(find("02-1"), lambda *rest: torch.tensor(7.0))
    assert "blocks = 3 functions" in shown and "layer = 0, position = 2 the answer is" in shown
    exercises.check("02-2", lambda nie, te: nie.sum() / te.sum())
    assert capsys.readouterr().out == "02-2: right.\n"
    with pytest.raises(KeyError, match="no exercise '02-9'"):
        find("02-9")


def test_an_answer_that_is_right_and_changes_its_input_is_told() -> None:
    one = find("05-1")

    def in_the_run_itself(control: torch.Tensor, treated: torch.Tensor, groups: list[str], name: str) -> torch.Tensor:
        inside = torch.tensor([group == name for group in groups])
        control[inside] = treated[inside]
        return control

    assert "in place" in judge(one, in_the_run_itself)
    assert judge(one, lambda control, *rest: in_the_run_itself(control.clone(), *rest)) == "", "no case is spoiled"


@each_notebook
def test_what_is_made_from_the_sources_is_up_to_date(number: str) -> None:
    path = notebook_of(number)
    made = {build.FOLDER / path.name: build.students_notebook(number, path)}
    made[path] = build.with_exercises(notebooks.read_notebook(path), number, path)
    for file, notebook in made.items():
        assert file.read_text(encoding="utf-8") == notebooks.notebook_text(notebook), "run python -m exercises.build"


@each_notebook
def test_a_students_notebook_runs_unsolved_and_solved(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = notebooks.code_cells(json.loads((build.FOLDER / notebook_of(number).name).read_text(encoding="utf-8")))
    names: dict[str, Any] = {}
    solutions = {one.solution.__name__: one.solution for one in of_notebook(number)}
    for cell in cells[:-1]:
        exec(notebooks.source(cell), names)
    assert capsys.readouterr().out.count("empty") == len(solutions)
    for cell in cells[1:-1]:
        exec(notebooks.source(cell), names | solutions)
    assert capsys.readouterr().out.count("right.") == len(solutions)


@each_notebook
def test_the_first_use_of_a_term_is_linked(number: str) -> None:
    cells = notebooks.read_notebook(notebook_of(number))["cells"]
    prose = [cell for cell in cells if cell["cell_type"] == "markdown" and "exercise" not in str(notebooks.tags(cell))]
    whole = "\n".join(notebooks.source(cell) for cell in prose)
    for name, words in glossary.terms().items():
        link = whole.find(f"]({glossary.LINK}{name})")
        use = glossary.first_use(whole, words)
        assert use is None or -1 < link < use.start(), f"{name} at {whole[use.start() - 40 : use.end()]!r}"
    assert whole.count(glossary.LINK) == len(set(re.findall(re.escape(glossary.LINK) + r"([\w-]+)", whole)))


def test_every_glossary_link_has_its_entry() -> None:
    text = glossary.GLOSSARY.read_text(encoding="utf-8")
    anchors = {glossary.anchor(name) for name in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
    assert len(glossary.terms()) == text.count("*also: ") >= 40


def test_the_instructor_guide_has_the_key() -> None:
    text = guide.GUIDE.read_text(encoding="utf-8")
    assert text == guide.filled(text), "run python -m exercises.build"
    for number, found in mystery.keys(1).items():
        assert f"| {number} | {' | '.join(found.values())} |" in text
    with pytest.raises(ValueError, match="made: key"):
        guide.filled(text.replace("<!-- end: key -->", ""))


def test_a_number_in_prose_is_that_of_one_row_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)
    (tmp_path / numbers.DEFAULT).mkdir()
    (tmp_path / numbers.DEFAULT / "t.csv").write_text("name,part,x\na b,1,0.678\na b,2,-0.5\n")
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "t.csv").write_text("part,x\n1,7\n")
    assert numbers.filled("<!--=run-1/t part=1: x-->6.0").endswith("-->7.0"), "of another run"
    marked = '<!--=t name="a b" part=1: x*100-->12 and <!--=t part=2: x-->−1.00 of 3.5'
    assert re.sub("<!--.*?-->", "", numbers.filled(marked)) == "68 and −0.50 of 3.5"
    for wrong, said in (("part=3: x", "0 rows"), ('name="a b": x', "2 rows")):
        with pytest.raises(InputError, match=said):
            numbers.filled(f"<!--=t {wrong}-->1")
    with pytest.raises(InputError, match=r"u.csv is not there"):
        numbers.filled("<!--=u part=1: x-->1")


# ---- questions ----


@pytest.fixture(scope="module", autouse=True)
def made_once() -> Iterator[None]:
    """Questions share compiled models and the embedded prompt set: each is made once for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "draw", cache(compiled.draw))
        patch.setattr(pairs, "load_set", cache(pairs.load_set))
        yield


def test_a_notebook_has_two_to_four_exercises_and_one_is_a_question_whose_key_the_code_shuffles() -> None:
    assert set(mystery.keys()) == set(QUESTIONS) == set(NUMBERS)
    for number in NUMBERS:
        numbers = [one.number for one in of_notebook(number)]
        assert numbers == [f"{number}-{place}" for place in range(1, len(numbers) + 1)]
        assert 2 <= len(numbers) + 1 <= 4 and QUESTIONS[number].number == f"{number}-open"
        found = [mystery.key(number, code) for code in CODES]
        assert all(set(one) == set(mystery.LETTERS) for one in found)
        assert len({tuple(one.values()) for one in found}) > 1, f"{number} has the same key for every class"


@pytest.mark.parametrize("code", CODES)
def test_00_the_sign_of_the_interaction_tells(code: int) -> None:
    table = mystery.cells(code)
    interaction = (table.y11 - table.y10 - table.y01 + table.y00).groupby(table.mediator).mean()
    names = np.select([interaction > 1, interaction < -1], mystery.NATURES["00"][1:], mystery.NATURES["00"][0])
    assert dict(zip(interaction.index, names, strict=True)) == mystery.key("00", code)


@pytest.mark.parametrize("code", CODES)
def test_01_topics_and_wrapper_words_tell(code: int) -> None:
    for letter, drawn in mystery.prompt_sets(code).items():
        splits = pd.Series([pair.split for pair in drawn]).groupby([pair.topic for pair in drawn]).nunique()
        neutral_is_treated = any(" simple " in pair.treated for pair in drawn)
        says = mystery.NATURES["01"][1 if splits.max() > 1 else 2 if neutral_is_treated else 0]
        assert says == mystery.key("01", code)[letter]


def direct(one: Study, site: str) -> pd.Series:
    wanted = estimands.mediators(one.subject, [site])
    table = estimands.measure_effects(one.subject, one.of("T2"), one.openers, wanted)
    return table.groupby("layer").nie0.mean()


def decided(one: Study) -> str:
    at = depth(int(direct(one, "mlp_out.direct").idxmax()), one.subject.n_layers)
    return "early" if at < EARLY else "late" if at > LATE else "middle"


def writer(one: Study) -> str:
    return "mlp" if direct(one, "mlp_out.direct").max() > direct(one, "attn_out.direct").max() else "attention"


def neighbours(one: Study) -> str:
    columns = single.all_neurons(one.subject, [one.subject.n_layers - 1])
    table = single.neuron_table(single.measure_chosen(one, "T2", columns)[0])
    effect = table.groupby("neuron").nie0.mean().abs()
    large = np.flatnonzero(effect > 0.02 * effect.sum())
    return mystery.NATURES["04"][2 if len(large) <= 8 else 0 if np.median(np.diff(large)) <= 2 else 1]


def fetched(one: Study) -> str:
    wanted = estimands.mediators(one.subject, ["resid_post"], ["differ"])
    table = estimands.measure_effects(one.subject, one.of("T2"), one.openers, wanted)
    share = table.groupby("layer").nie0.sum() / table.groupby("layer").te.sum()
    return f"layer {share.index[share < 0.5][0]}"


@pytest.mark.parametrize(("number", "measured"), [("02", decided), ("03", writer), ("04", neighbours), ("05", fetched)])
def test_02_to_05_what_one_measures_is_what_was_built(number: str, measured: Callable[[Study], str]) -> None:
    models = mystery.models(number, 1)
    names = [f"{one.slug} {one.subject.name}" for one in models.values()]
    assert names == ["A A", "B B", "C C"], "no name gives it away"
    assert {letter: measured(one) for letter, one in models.items()} == mystery.key(number, 1)


def test_06_half_of_a_vector_moves_the_outcome_its_way() -> None:
    this = study.begin("embedded", "embedded", "embedded", profile="smoke")
    batch = estimands.run_clean(this.subject, estimands.batches(this.of("T2"), this.subject)[0])
    last, moved = batch.treated.resid_post[-1][:, -1], dict[str, float]()
    for letter, vector in mystery.vectors(this, 1).items():
        moved[letter] = float(outcomes.log_odds(this.subject, last + vector / 2, this.openers["T2"]).mean())
    names = ("towards refusing", "neither", "towards complying")
    assert dict(zip(sorted(moved, key=moved.__getitem__), names, strict=True)) == mystery.key("06", 1), moved


@pytest.mark.parametrize("code", (0, 1))
def test_07_a_trained_part_shows_beside_a_model_in_which_everything_was_trained(code: int) -> None:
    tables = mystery.plants(code)
    more = {letter: table - tables["whole"] for letter, table in tables.items() if letter != "whole"}
    writes, passes = more["A"].columns.sort_values(ascending=False)
    says = {}
    for letter, table in more.items():
        attention, middle = table.index.str.startswith("attn"), table.index.str.endswith("middle")
        late = "last third" if table.loc[middle, passes].sum() < -0.05 else "first third"
        says[letter] = "attention" if table.loc[attention, writes].sum() > 0.2 else late
    assert says == mystery.key("07", code)


@pytest.mark.parametrize("code", (0, 1))
def test_08_the_ledger_agrees_with_the_key(code: int) -> None:
    found = {letter: mystery.verdict(table) for letter, table in mystery.evidence(code).items()}
    assert found == mystery.key("08", code)
