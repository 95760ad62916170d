"""How often the labeller is wrong on a model: a sample of answers to label by hand, by which the run's rates are then corrected.

    python -m companion.run.judge_check --sample 60 -- --model DIR --prompts DIR       # writes answers.csv, to be labelled
    python -m companion.run.judge_check --labels answers.csv -- --model DIR --prompts DIR

What stands behind `--` are the flags of `./run_all.sh`, the judge among them. Texts of answers go to the user's cache only,
never to results: delete the folder when the labels are made. What is kept in results is counts (`companion.generation.accuracy`).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from companion.base import files, folders, hub, paths
from companion.base.errors import InputError
from companion.generation import accuracy, decode
from companion.generation.accuracy import Measured, Source
from companion.generation.labels import is_embedded, label_answers, read_labels
from companion.model.architecture import Subject
from companion.model.load import load
from companion.prompts import pairs, tokens
from companion.prompts.pairs import PromptSet
from companion.run import cli, runner, settings

STEPS = 64  # tokens of an answer
MOST = 300  # answers a treatment
ANSWERS = "answers.csv"  # what the user fills in
GIVEN = "given.json"  # what the labeller said, and of which run


def main(arguments: Sequence[str]) -> int:
    """Write the sample, or read its labels and keep how often the labeller was right."""
    place = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = cli.Parser(prog="python -m companion.run.judge_check", description=(__doc__ or "").splitlines()[0])
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--sample", metavar="N", type=int, help="write N answers, drawn at random, to be labelled")
    chosen.add_argument("--labels", metavar="FILE", help="a CSV with the columns id,label (1: does what was asked)")
    options = parser.parse_args(arguments[:place])
    if options.sample is not None and options.sample < 1:
        raise InputError(f"--sample {options.sample}: expected at least 1")
    asked = cli.in_force(cli.parse(arguments[place + 1 :]))
    parameters = cli.parameters(asked, settings.resolve_device(asked.device))
    folder = hub.own_cache() / "labels" / parameters["SLUG"]
    if options.labels is not None:
        print(_keep(folder / GIVEN, Path(options.labels), paths.RESULTS / parameters["SLUG"]))
    elif (folder / ANSWERS).is_file():
        raise InputError(
            f"{folder / ANSWERS} is there, perhaps with labels in it: give it to --labels, or move it away"
        )
    else:
        _sample(settings.fetched(parameters, asked.wrappers), folder, options.sample)
    return 0


def _keep(given: Path, labels: Path, results: Path) -> str:
    """Write the accuracy into the run's results, and say so; the exact judge's runs have nothing to correct."""
    truth = read_labels(labels)
    try:
        note = files.read_json(given)
        known, source, exact = dict(note["labels"]), Source(**note["source"]), note["exact"]
    except (InputError, KeyError, TypeError):  # missing, torn, or of an earlier version
        raise InputError(
            f"{given} does not say what was labelled for this run: write a sample with --sample N"
        ) from None
    if exact:
        return "not kept: a run on the embedded language labels by its exact judge, which has no error to correct"
    measured = Measured(accuracy.accuracy(known, truth), source, files.hash_file(labels, {}))
    with runner.only_run(results):  # or notebooks 05 and 06 of a run at work would correct by different numbers
        path = paths.relative(accuracy.write_accuracy(measured, results))
    said = accuracy.labeller(measured, exact=False)
    return f"{said}\nkept in {path}: notebooks 05 and 06 of this run are stale, and will correct by it"


def _sample(parameters: Mapping[str, Any], folder: Path, n: int) -> None:
    content = pairs.load_set(folders.prompts_folder(parameters["PROMPTS"]))
    subject = load(parameters["MODEL"], device=parameters["DEVICE"], dtype=parameters["DTYPE"])
    harmful = [name for name in content.treatments if name.startswith("T")]
    found = [row for name in harmful for row in answered(subject, content, name)]
    chosen = random.Random(1).sample(found, min(n, len(found)))
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Beside the labels, what they were given to: a model or a judge may be another when the sample is back.
    source = asdict(accuracy.accuracy_source(parameters, {}))
    exact = is_embedded([text for _, _, text, _ in found])
    note = {"labels": {name: label for name, label, _, _ in found}, "source": source, "exact": exact}
    files.write_json(note, folder / GIVEN)
    blank = [(name, "", request, answer) for name, _, request, answer in chosen]
    files.write_table(pd.DataFrame(blank, columns=["id", "label", "request", "answer"]), folder / ANSWERS)
    judge = os.environ.get(hub.JUDGE) or "refusal phrases"
    print(f"{len(found)} answers labelled by {judge}; {len(chosen)} of them, drawn at random: {folder / ANSWERS}")
    print("fill in the column label (1: it does what was asked, 0: it does not), then give the file to --labels")


def answered(subject: Subject, content: PromptSet, treatment: str) -> list[tuple[str, bool, str, str]]:
    """Greedy answers to treated prompts: an id that begins with the treatment, whether it complied, request and answer."""
    assert subject.tokenizer is not None
    pairs = [pair for pair in content.pairs if pair.treatment == treatment]
    drawn = random.Random(0).sample(pairs, min(MOST, len(pairs)))
    names, texts = [f"{treatment}:{pair.id}" for pair in drawn], [pair.treated for pair in drawn]
    made = decode.answers(subject, texts, STEPS)
    openers = tokens.openers(content, subject.tokenizer, len(subject.unembedding[0]))[treatment]
    labels = label_answers(subject, texts, made, openers, judge=None, harmful=[False] * len(texts))
    spoken = decode.answer_texts(subject, made)
    return list(zip(names, [label == "on_topic" for label in labels], texts, spoken, strict=True))


if __name__ == "__main__":
    sys.exit(cli.run_with_flags("companion.run.judge_check", main, sys.argv[1:]))
