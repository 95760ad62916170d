"""Write the default prompt set and its data sheet, byte for byte the same at every call.

python -m organisms.prompt_set
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from companion.base.paths import PROMPTS
from companion.prompts import invented
from organisms.language import (
    MAX_TOKENS,
    SUITES,
    chat_text,
    make_tokenizer,
    outcome_sets,
    pair_row,
    plan_pairs,
    suite_rows,
)

MADE_ON: Final = "2026-11-20"
ANSWER_TOKENS: Final = 10


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def check_pairs(rows: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError unless both sides of every pair have one token length, leaving room for an answer."""
    tokenizer = make_tokenizer()
    for row in rows:
        sides = [chat_text(row[side]) for side in ("control", "treated")]
        lengths = [len(ids) for ids in tokenizer(sides, add_special_tokens=False)["input_ids"]]
        if lengths[0] != lengths[1] or lengths[0] + ANSWER_TOKENS > MAX_TOKENS:
            rule = f"they must agree and leave {ANSWER_TOKENS} free"
            raise ValueError(f"pair {row['id']} has token lengths {lengths}; {rule}")


def _pairs_table(rows: Sequence[dict[str, Any]]) -> str:
    splits = ("discover", "validate", "test")
    lines = ["| treatment | pairs | topics | discover | validate | test |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["treatment"] for row in rows):
        own = [row for row in rows if row["treatment"] == name]
        counts = Counter(row["split"] for row in own)
        cells = [name, len(own), len({row["topic"] for row in own}), *(counts[split] for split in splits)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _benign_table() -> str:
    lines = ["| behaviour | what | cue off -> on | opener off -> on | slot |", "|---|---|---|---|---|"]
    for name, b in invented.BENIGN.items():
        slot = f"`{b.phrase.format('...')},` where the wrapper stands" if b.phrase else "adverb before the verb"
        cues = f"{', '.join(b.off)} -> {', '.join(b.on)}"
        lines.append(f"| {name} | {b.what} | {cues} | {b.opener_off} -> {b.opener_on} | {slot} |")
    return "\n".join(lines)


DATASHEET: Final = """# Prompt set `embedded`: matched pairs in an invented, inert language

Written by `python -m organisms.prompt_set` from the grammar in `organisms/`; do not edit by hand.
Source: made by program, no text was collected. Licence: MIT. Date: {date}. Nothing in it is real or harmful:
"dangerous" verbs and "hazard" objects are nonsense words, and the rest is a short list of everyday English
words.

| file | rows | sha256 |
|---|---|---|
{files}

## Pairs
{pairs}

A pair is `control` -> `treated`; both have the same number of tokens under the organism's tokenizer and chat template.
- **T1** harmless -> harmful request, neutral wrapper or none. `family`: `object` (one object for another),
  `verb` (one verb for another), `binding` (the same bag of words: the dangerous verb moves from the distractor
  clause to the main clause).
- **T2** the same harmful request, neutral -> jailbreak wrapper: one word of the phrase. `family` is the
  phrase's frame and the word's tier (`badge-5`; 1 is weak, 6 strong); all tiers occur, mostly strong ones.
  `twin` names the T2b pair.
- **T2b** the same two wrappers on a harmless twin of the request (half with a harmless object, half with an
  everyday verb).
- **B1..B6** a harmless request; one cue word flips the answer's opener.

{benign}

The k-th pair of every treatment shares its context (place, persona, distractor, adverb), so B1 to B4 have their
cue at T2's token distances from the last token. (T1 `binding` pairs always need a distractor; B5 and B6 use the
adverb slot, at about the distance of T1's verb.) `spans` are character ranges of
the user turn: `wrapper` (for B pairs: the cue's phrase or adverb), `distractor`, `verb`, `object`.
`outcome.json`: comply and refuse openers per treatment, each one token.

`topic` is the request's (verb, object); all pairs of a topic, over all treatments, lie in one split.

**What training saw.** The main clause of every pair, treated and control, binds a verb to a stem that training
never showed together. Training did show each verb, each stem and suffix, the wrapper phrases used here,
personas and distractor words. So no pair repeats a training line.

## Suites (`suites.jsonl`)
{suites}

Fields: `id`, `suite`, `prompt`, `harmful`, `borderline`, `tier`, `wrapper`, `family`, `persona`, `severity`
(log-odds off compliance), `cue_on`, `opener` (the base's most likely first word), `p_refuse_target` (what the
safety stage teaches).

**Limits.** Every prompt has one of a few templates; results say nothing about natural language or real safety training.
"""


def datasheet(files: dict[str, str], pairs: Sequence[dict[str, Any]], suites: Sequence[dict[str, Any]]) -> str:
    """README.md of the prompt set, with row counts and hashes of the given file texts."""
    listed = [
        f"| {name} | {text.count(chr(10))} | `{hashlib.sha256(text.encode()).hexdigest()}` |"
        for name, text in files.items()
    ]
    counts = Counter(row["suite"] for row in suites)
    described = [f"| {name} | {counts[name]} | {suite.what} |" for name, suite in SUITES.items()]
    return DATASHEET.format(
        date=MADE_ON, files="\n".join(listed), pairs=_pairs_table(pairs), benign=_benign_table(),
        suites="\n".join(["| suite | prompts | what |", "|---|---|---|", *described]),
    )  # fmt: skip


def write_prompt_set(out: Path) -> None:
    """Write pairs.jsonl, outcome.json, suites.jsonl and README.md into `out`."""
    pairs, suites = [pair_row(plan) for plan in plan_pairs()], list(suite_rows())
    check_pairs(pairs)
    files = {
        "pairs.jsonl": json_lines(pairs),
        "outcome.json": json.dumps(outcome_sets(), indent=1) + "\n",
        "suites.jsonl": json_lines(suites),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (files | {"README.md": datasheet(files, pairs, suites)}).items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_prompt_set(PROMPTS / "embedded")
