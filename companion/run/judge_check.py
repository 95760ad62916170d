"""How often the labeller is wrong on a model: a sample of answers to label by hand, then rates corrected by it.

    python -m companion.run.judge_check --sample 60 -- --model DIR --prompts DIR       # writes answers.csv, to be labelled
    python -m companion.run.judge_check --labels answers.csv -- --model DIR --prompts DIR

What stands behind `--` are the flags of `./run_all.sh`, the judge among them. Texts of answers go to the user's cache only,
never to results: delete the folder when the labels are made. What is kept in results is counts (`companion.generation.accuracy`).
"""

from __future__ import annotations

import csv
import io
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from companion.base import files, folders, hub, paths
from companion.base.errors import InputError
from companion.generation import accuracy, decode, labels
from companion.generation.accuracy import Measured, Source
from companion.generation.labels import label_answers, read_labels
from companion.model.architecture import Subject
from companion.model.load import load
from companion.prompts import pairs, tokens
from companion.prompts.pairs import PromptSet
from companion.run import cli, runner, settings

STEPS = 64  # tokens of an answer
MOST = 300  # answers a treatment
ANSWERS = "answers.csv"  # what the user fills in
GIVEN = "given.csv"  # what the labeller said


def main(arguments: Sequence[str]) -> int:
    """Write the sample, or read its labels and print the rates of each treatment's treated prompts."""
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    own, words = arguments[:place], arguments[place + 1 :]
    parser = cli.Parser(prog="python -m companion.run.judge_check", description=(__doc__ or "").splitlines()[0])
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--sample", metavar="N", type=int, help="write N answers, drawn at random, to be labelled")
    chosen.add_argument("--labels", metavar="FILE", help="a CSV with the columns id,label (1: does what was asked)")
    options = parser.parse_args(own)
    if options.sample is not None and options.sample < 1:
        raise InputError(f"--sample {options.sample}: expected at least 1")
    asked = cli.flags_of_one_run(words)
    parameters = cli.parameters(asked, settings.resolve_device(asked.device))
    folder = hub.own_cache() / "labels" / parameters["SLUG"]
    if options.labels is None:
        _refuse_to_lose(folder / ANSWERS)  # labels made by hand
        return _sample(settings.fetched(parameters, asked.wrappers), folder, options.sample)
    print("\n".join(rates(folder, labels.read_labels(Path(options.labels)))))
    print(_kept(folder, Path(options.labels), paths.RESULTS / parameters["SLUG"]), file=sys.stderr)
    return 0


def _refuse_to_lose(file: Path) -> None:
    """`InputError` if a file that a new sample would take the place of holds labels made by hand."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        made = sum(bool((row.get("label") or "").strip()) for row in csv.DictReader(lines))
    if made:
        what = f"{file} holds {made} labels made by hand, which a new sample would write over"
        raise InputError(f"{what}: give it to --labels, or move it away")


def _kept(folder: Path, labels: Path, results: Path) -> str:
    """Write the accuracy into the run's results, and say so; the exact judge's runs have nothing to correct."""
    given = files.hash_file(folder / GIVEN, {})
    try:
        note = files.read_json(folder / "given.json")
        source, exact, is_its_own = Source(**note["source"]), note["exact"], note["given"] == given
    except (InputError, KeyError, TypeError):  # missing, torn, or of an earlier version
        is_its_own = False
    if not is_its_own:
        raise InputError(f"nothing says which run {folder / GIVEN} belongs to: write a new sample with --sample N")
    if exact:
        return "not kept: a run on the embedded language labels by its exact judge, which has no error to correct"
    known = accuracy.accuracy(read_labels(folder / GIVEN), read_labels(labels))
    measured = Measured(known, source, files.hash_file(labels, {}))
    with runner.only_run(results):  # or notebooks 05 and 06 of a run at work would correct by different numbers
        path = paths.relative(accuracy.write_accuracy(measured, results))
    return f"kept in {path}, without a text: notebooks 05 and 06 of this run now count as stale and will correct by it"


def rates(folder: Path, truth: Mapping[str, bool]) -> list[str]:
    """One line a treatment: how many answers comply by the labeller's word, and corrected by the labels made by hand.

    Raises InputError where there are no labels to correct, or too few made by hand of either kind.
    """
    file = folder / GIVEN
    if not file.is_file():
        raise InputError(f"nothing was labelled for this run yet ({file} is not there): write a sample with --sample N")
    given = labels.read_labels(file)
    known = accuracy.accuracy(given, truth)
    found: dict[str, list[bool]] = {}
    for name, label in given.items():
        found.setdefault(name.partition(":")[0], []).append(label)
    return [f"{name}, complied: {accuracy.describe(np.array(some), known)}" for name, some in sorted(found.items())]


def _sample(parameters: Mapping[str, Any], folder: Path, n: int) -> int:
    content = pairs.load_set(folders.prompts_folder(parameters["PROMPTS"]))
    subject = load(parameters["MODEL"], device=parameters["DEVICE"], dtype=parameters["DTYPE"])
    harmful = [name for name in content.treatments if name.startswith("T")]
    found = [row for name in harmful for row in answered(subject, content, name)]
    chosen = random.Random(1).sample(found, min(n, len(found)))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    given = [(name, int(label)) for name, label, _, _ in found]
    file = files.write_text(_csv(("id", "label"), *given), folder / GIVEN)
    # Beside the labels, what they were given to: a model or a judge may be another when the sample is back.
    note = {
        "given": files.hash_file(file, {}),
        "source": asdict(accuracy.accuracy_source(parameters, {})),
        "exact": labels.is_embedded([text for _, _, text, _ in found]),
    }
    files.write_json(note, file.with_suffix(".json"))
    blank = [(name, "", request, answer) for name, _, request, answer in chosen]
    files.write_text(_csv(("id", "label", "request", "answer"), *blank), folder / ANSWERS)
    judge = os.environ.get(hub.JUDGE) or "refusal phrases"
    print(f"{len(found)} answers labelled by {judge}; {len(chosen)} of them, drawn at random: {folder / ANSWERS}")
    print("fill in the column label (1: it does what was asked, 0: it does not), then give the file to --labels")
    return 0


def answered(subject: Subject, content: PromptSet, treatment: str) -> list[tuple[str, bool, str, str]]:
    """Greedy answers to treated prompts: an id that begins with the treatment, whether it complied, request and answer."""
    assert subject.tokenizer is not None
    pairs = [pair for pair in content.pairs if pair.treatment == treatment]
    drawn = random.Random(0).sample(pairs, min(MOST, len(pairs)))
    names, texts = [f"{treatment}:{pair.id}" for pair in drawn], [pair.treated for pair in drawn]
    made = decode.answers(subject, texts, STEPS)
    openers = tokens.openers(content, subject.tokenizer)[treatment]
    labels = label_answers(subject, texts, made, openers, judge=None, harmful=[False] * len(texts))
    spoken = decode.answer_texts(subject, made)
    return list(zip(names, [label == "on_topic" for label in labels], texts, spoken, strict=True))


def _csv(*rows: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(cli.run_with_flags("companion.run.judge_check", main, sys.argv[1:]))
