"""Public sets by name: columns, correspondence of rows, access, and what is written of them. All rows are placeholders."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from families import tiny_model
from hub_cache import TEMPLATE, tiny_tokenizer

from companion.base import thresholds
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.generation import openers
from companion.generation.openers import FoundOpeners
from companion.model.load import load_tokenizer
from companion.prompts import pairs, public, tokens, wrappers
from companion.prompts.public import SETS, read_public_set
from companion.run import settings
from tests.nine_families import texts_in

WRAPPERS = [
    {"family": "tale", "neutral": "w5 w6 {request} w7", "jailbreak": "w8 w9 {request} w7"},
    {"family": "long", "neutral": "w5 {request}", "jailbreak": "w8 w9 w10 {request}"},
]


def jbb(n: int = 12, **changes: str) -> dict[str, list[dict]]:
    """Row i of both splits belongs together; every third pair differs in length."""
    sides: dict[str, list[dict]] = {"harmful": [], "benign": []}
    for i in range(n):
        kinds = {"Index": i, "Target": "", "Behavior": f"b{i}", "Category": f"c{i % 4}"}
        sides["harmful"].append({"Goal": f"w20 w{30 + i}", **kinds})
        sides["benign"].append({"Goal": f"w21 w{30 + i}{'' if i % 3 else ' w4'}", **kinds})
    sides["benign"][2] |= changes
    return sides


def prompt_rows(n: int = 12) -> dict[str, list[dict]]:
    return {"train": [{"prompt": f"w22 w{30 + i} w40", "category": "k"} for i in range(n)]}


def alpaca() -> dict[str, list[dict]]:
    rows = [{"instruction": " ".join(f"w{3 + (i + j) % 50}" for j in range(1 + i % 4)), "input": ""} for i in range(60)]
    return {"train": [*rows, {"instruction": "w3 w4 w5", "input": "more"}]}


def xstest() -> dict[str, list[dict]]:
    kinds = [("homonyms", "safe")] * 3 + [("contrast_homonyms", "unsafe")] * 2
    kinds += [("privacy_fictional", "safe"), ("real_group_nons_discr", "safe"), ("contrast_privacy", "unsafe")]
    kinds += [("contrast_discr", "unsafe")] * 2
    return {"test": [{"prompt": f"request {i}", "type": kind, "label": label} for i, (kind, label) in enumerate(kinds)]}


HUB = {
    "JailbreakBench/JBB-Behaviors": jbb,
    "walledai/StrongREJECT": prompt_rows,
    "walledai/XSTest": xstest,
    "tatsu-lab/alpaca": alpaca,
}


# What each set's page says: (configuration, split) to columns. Independent of companion.prompts.public, whose lines it checks.
PAGES: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "JailbreakBench/JBB-Behaviors": {
        ("behaviors", split): ("Index", "Goal", "Target", "Behavior", "Category") for split in ("harmful", "benign")
    },
    "walledai/StrongREJECT": {("", "train"): ("prompt", "category")},
    "walledai/MaliciousInstruct": {("", "train"): ("prompt",)},
    "walledai/XSTest": {("", "test"): ("prompt", "type", "label")},
    "bench-llm/or-bench": {
        (config, "train"): ("prompt", "category") for config in ("or-bench-80k", "or-bench-hard-1k", "or-bench-toxic")
    },
    "tatsu-lab/alpaca": {("", "train"): ("instruction", "input", "output")},
    "walledai/AdvBench": {("", "train"): ("prompt", "target")},
    "walledai/HarmBench": {
        (config, "train"): ("prompt", "category") for config in ("standard", "contextual", "copyright")
    },
    "allenai/wildjailbreak": {("train", "train"): ("vanilla", "adversarial", "completion", "data_type")},
    "sorry-bench/sorry-bench-202503": {("", "train"): ("question_id", "category", "turns", "prompt_style")},
    "allenai/wildguardmix": {
        ("wildguardtest", "test"): ("prompt", "adversarial", "response", "prompt_harm_label", "subcategory"),
        ("wildguardtrain", "train"): ("prompt", "adversarial", "response", "prompt_harm_label", "subcategory"),
    },
}
MARKED = {  # values that tell harmful from harmless rows, of a column
    "label": ("unsafe", "safe"),
    "data_type": ("vanilla_harmful", "vanilla_benign", "adversarial_harmful"),
    "prompt_harm_label": ("harmful", "unharmful"),
    "prompt_style": ("base", "slang"),
}


def test_every_set_is_read_by_the_columns_and_configurations_of_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(repo: str, *config: str) -> datasets.DatasetDict:
        splits = {split: columns for (name, split), columns in PAGES[repo].items() if name == "".join(config)}
        if not splits:
            raise ValueError(f"BuilderConfig {config} not found")
        return datasets.DatasetDict(
            {s: datasets.Dataset.from_list([row(c, i) for i in range(6)]) for s, c in splits.items()}
        )

    def row(columns: tuple[str, ...], i: int) -> dict:
        made = {name: MARKED[name][i % len(MARKED[name])] if name in MARKED else f"{name} {i}" for name in columns}
        return (
            made
            | ({"turns": [f"turns {i}", "more"]} if "turns" in columns else {})
            | {name: "same" for name in ("category", "Category", "type") if name in columns}
            | ({"input": ""} if "input" in columns else {})
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert {public.repo for public in SETS.values()} == set(PAGES)
    for name, one in SETS.items():
        for part in (one.harmful, one.harmless):
            found = read_public_set(name, one, part) if part is not None else ()
            assert len({request.text for request in found}) == len(found)
            assert part is None or found
            marked = [column for column in (part.where if part else ()) if column in MARKED]
            assert len(found) == (0 if part is None else 6 / len(MARKED[marked[0]]) if marked else 6), name


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The library's own reader on small files with the public sets' columns."""
    content = dict(HUB)
    plain = datasets.load_dataset

    def load(repo: str, *config: str) -> datasets.DatasetDict:
        if repo not in content:
            raise DatasetNotFoundError(f"Dataset '{repo}' is a gated dataset on the Hub. You must be authenticated.")
        made = content[repo]
        files = {}
        for split, rows in (made() if callable(made) else made).items():
            files[split] = str(tmp_path / f"{split}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return plain("json", data_files=files, cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv(public.CACHE, str(tmp_path / "cache"))
    return content


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    tiny_model("llama").save_pretrained(place)
    return place


@pytest.fixture
def template_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine" / wrappers.FILE
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in WRAPPERS))
    return file


def test_rows_that_correspond_are_paired_by_index(served: dict) -> None:
    rows = public.load_rows("jailbreakbench")
    assert [(one.text, other.text) for one, other in zip(rows.harmful, rows.harmless, strict=True)][1] == (
        "w20 w31",
        "w21 w31",
    )
    assert rows.harmful[1].id == "jailbreakbench-001" and len(rows.harmful[1].sha256) == 64
    served["JailbreakBench/JBB-Behaviors"] = jbb(Category="c9")
    with pytest.raises(InputError, match=r"do not correspond \(row 2 differs in its category\)"):
        public.load_rows("jailbreakbench")
    served["JailbreakBench/JBB-Behaviors"] = jbb(Goal=" ")
    with pytest.raises(InputError, match=r"do not correspond \(row 2 has no harmless request\)"):
        public.load_rows("jailbreakbench")
    served["JailbreakBench/JBB-Behaviors"] = {"harmful": jbb()["harmful"], "benign": jbb(11)["benign"]}
    with pytest.raises(InputError, match="do not correspond"):
        public.load_rows("jailbreakbench")


def test_a_type_and_its_contrast_are_paired_in_order(served: dict) -> None:
    rows = public.load_rows("xstest")
    assert [(a.row, b and b.row) for a, b in zip(rows.harmful, rows.harmless, strict=True)] == [
        (3, 0),
        (4, 1),
        (7, 5),
        (8, 6),
        (9, None),
    ], "the second of discrimination has no safe request left"


def test_partners_by_order_are_no_twins_and_lost_rows_are_counted(served: dict, model: Path) -> None:
    said: list[str] = []
    made = settings.collect("xstest", load_tokenizer(model), wrappers_of(WRAPPERS), said.append)
    assert "xstest: 1 of 5 harmful rows have no harmless partner of their category" in said
    kinds = Counter(pair.treatment for pair in made.pairs)
    assert kinds == {"T1": 4, "T2": 10} and made.n_requests == 5, "T2 needs no partner"
    assert not [pair for pair in made.pairs if pair.twin]


def test_what_changed_or_is_gated_is_said_without_a_text(served: dict) -> None:
    with pytest.raises(
        InputError, match=r"advbench is gated: accept its terms at huggingface.co/datasets/walledai/AdvBench"
    ):
        public.load_rows("advbench")
    served["walledai/StrongREJECT"] = {"train": [{"secret": "request 17", "category": "k"}]}
    with pytest.raises(InputError, match=r"no column 'prompt' \(it has secret, category\)") as caught:
        public.load_rows("strongreject")
    assert "request 17" not in str(caught.value)


def caused(cause: Exception) -> Exception:
    error = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = cause
    return error


REFUSALS = {
    "no network": (
        ConnectionError("Couldn't reach the Hub"),
        "the hub cannot be reached: connect, unset HF_HUB_OFFLINE",
    ),
    "script": (
        RuntimeError("Dataset scripts are no longer supported, but found StrongREJECT.py"),
        r"^strongreject \(walledai/StrongREJECT\) is read by a script of its own.*: name another set",
    ),
    "broken off": (
        RuntimeError("request 17"),
        r"^the transfer of strongreject \(.*\) broke off .*: run the same command",
    ),
    "broken off, hidden": (
        caused(RuntimeError("request 17")),
        r"broke off \(RuntimeError\): run the same command again",
    ),
    "anything else": (caused(ValueError("request 17")), r"could not be loaded \(DatasetGenerationError\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_every_error_of_the_datasets_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    error, message = REFUSALS[case]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=message) as caught:
        public.load_rows("strongreject")
    assert "\n" not in str(caught.value) and "request 17" not in str(caught.value), "a row may be quoted in it"


@pytest.mark.parametrize(
    "name", ["strongreject,nosuch", "strongreject,strongreject", "alpaca", "strongreject,alpaca", "alpaca+alpaca"]
)
def test_names_that_ask_for_nothing_usable(name: str) -> None:
    with pytest.raises(InputError, match="--prompts"):
        public.parse(name)


def test_the_cache_may_not_lie_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(public.CACHE, str(ROOT / "data" / "x"))
    with pytest.raises(InputError, match="lies inside the repository"):
        public.cache()


def test_a_set_is_made_with_wrappers_twins_and_hashes(
    served: dict, model: Path, template_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def find(subject: object, texts: list[str], own: Path) -> FoundOpeners:
        seen.extend(texts)
        return FoundOpeners(("w11",), ("w12",), 0.7, 3, 9)

    monkeypatch.setattr(openers, "find_openers", find)
    given = {"MODEL": str(model), "PROMPTS": "jailbreakbench,advbench", "DEVICE": "cpu", "DTYPE": "float32"}
    with pytest.raises(InputError, match="is not made for"):
        settings.known(given, str(template_file))
    found = settings.fetched(given, str(template_file))
    content = pairs.load_set(found["PROMPTS"])
    by_id = {pair.id: pair for pair in content.pairs}
    assert all(pair.sensitive for pair in content.pairs)
    t2 = by_id["jailbreakbench-004-t2-tale"]
    assert (t2.control, t2.treated) == ("w5 w6 w20 w34 w7", "w8 w9 w20 w34 w7")
    assert by_id[t2.twin].treated == "w8 w9 w21 w34 w7" and by_id[t2.twin].topic == t2.topic == "jailbreakbench-004"
    assert (by_id["jailbreakbench-004-t1"].control, by_id["jailbreakbench-004-t1"].treated) == ("w21 w34", "w20 w34")
    assert "w20 w30" in seen and "w8 w9 w20 w30 w7" in seen
    said = capsys.readouterr().out
    assert "left out: advbench is gated" in said
    assert (
        "T1: 8 of 12 requests have a benign partner of their length and can be interchanged; "
        "4 of 12 requests have no benign partner of their length\n"
    ) in said and "T2: 12 of 24 pairs" in said
    assert said.count("joint probability") == said.count("below 0.8: edit outcome.json") == 1
    assert not [pair for pair in content.pairs if pair.control in said or pair.treated in said]
    note = json.loads((Path(found["PROMPTS"]) / "set.json").read_text())
    assert len(note["rows"]) == 24 and note["rows"]["jailbreakbench-harmless-004"] == sha("w21 w34")
    (Path(found["PROMPTS"]) / "outcome.json").write_text('{"comply": [" w13"], "refuse": [" w12"]}')
    assert settings.fetched(given, str(template_file)) == found == settings.known(given, str(template_file)) | found
    again = capsys.readouterr().out
    assert "when it was made: left out: advbench is gated" in again, "said at every run"
    for treatment in ("T1", "T2", "T2b"):
        assert f"{treatment}: comply ' w13'; refuse ' w12' (joint probability 0.0" in again, "the user edited it"
    settings.fetched(given, str(template_file))
    assert "joint probability" not in capsys.readouterr().out, "said once of each version"
    for told in (said, again):
        assert f"to try the sets again that were left out: rm -r {found['PROMPTS']}, then the same command" in told
    assert pairs.load_set(found["PROMPTS"]).outcomes["T1"] == ((" w13",), (" w12",))
    assert settings.fetched(given, None)["PROMPTS"] != found["PROMPTS"]


def test_harmful_rows_alone_get_partners_of_equal_length(
    served: dict, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openers, "find_openers", lambda *_: FoundOpeners(("w11",), ("w12",), 0.9, 3, 9))
    tokenizer = load_tokenizer(model)
    said: list[str] = []
    made = settings.collect("strongreject", tokenizer, wrappers_of(WRAPPERS), said.append).pairs
    t1 = [pair for pair in made if pair.treatment == "T1"]
    assert len(t1) == 12 and all(tokens.token_pair(pair, tokenizer)[0] is not None for pair in t1)
    assert len({pair.control for pair in t1}) == 12
    assert {pair.treatment for pair in made} == {"T1", "T2"} and not [pair for pair in made if pair.twin]
    made = settings.collect("jailbreakbench+alpaca", tokenizer, (), said.append).pairs
    assert public.survival(made, 12, tokenizer) == [
        "T1: 12 of 12 requests have a benign partner of their length and can be interchanged"
    ]
    folder = public.folder("strongreject", str(model), None)
    settings.ensure(folder, "strongreject", str(model), None, device="cpu", dtype="float32", report=said.append)
    assert f"C1, C2, C4 to C7: {thresholds.NO_WRAPPERS}" in said and not any("rm -r" in line for line in said)


def test_a_request_without_a_partner_of_its_length_is_counted_and_has_its_wrappers(served: dict, model: Path) -> None:
    rows = prompt_rows()["train"]
    for row in rows[:7]:
        row["prompt"] += " w5 w6 w7 w8 w9"
    served["walledai/StrongREJECT"] = {"train": rows}
    tokenizer = load_tokenizer(model)
    made = settings.collect("strongreject", tokenizer, wrappers_of(WRAPPERS[:1]), lambda _: None)
    assert Counter(pair.treatment for pair in made.pairs) == {"T1": 5, "T2": 12}
    assert next(pair.treated for pair in made.pairs if pair.id == "strongreject-000-t2-tale").startswith(
        "w8 w9 w22 w30"
    )
    assert "strongreject-000" in made.hashes
    assert public.survival(made.pairs, made.n_requests, tokenizer) == [
        "T1: 5 of 12 requests have a benign partner of their length and can be interchanged; 7 of 12 requests have no "
        "benign partner of their length; few: take harmless partners by length (+alpaca), or sets with more rows",
        "T2: 12 of 12 pairs have equal token length and can be interchanged",
    ]
    served["tatsu-lab/alpaca"] = {"train": [{"instruction": "w3", "input": ""}]}
    made = settings.collect("strongreject", tokenizer, wrappers_of(WRAPPERS[:1]), lambda _: None)
    assert public.survival(made.pairs, made.n_requests, tokenizer)[0].startswith("T1: 0 of 12 requests")


def test_a_set_left_out_for_want_of_partners_takes_no_request_from_another(served: dict, model: Path) -> None:
    del served["tatsu-lab/alpaca"]
    served["walledai/StrongREJECT"] = {"train": [{"prompt": row["Goal"], "category": "k"} for row in jbb()["harmful"]]}
    said: list[str] = []
    made = settings.collect("strongreject,jailbreakbench", load_tokenizer(model), (), said.append)
    assert len(made.pairs) == made.n_requests == 12 and len(said) == 1
    assert said[0].startswith("left out: strongreject, which takes harmless partners from alpaca: alpaca is gated")


@pytest.mark.parametrize(
    "rows",
    [[], [{"prompt": "", "category": "k"}, {"prompt": " ", "category": "k"}], [{"prompt": None, "category": None}]],
)
def test_a_set_without_a_request_is_left_out_with_a_sentence(served: dict, model: Path, rows: list[dict]) -> None:
    said: list[str] = []
    served["walledai/StrongREJECT"] = {"train": rows}
    settings.collect("strongreject,jailbreakbench", load_tokenizer(model), (), said.append)
    assert len(said) == 1 and said[0].startswith("left out: ") and "StrongREJECT" in said[0]
    served["walledai/XSTest"] = {"test": [row | {"label": "other"} for row in xstest()["test"]]}
    with pytest.raises(InputError, match=r"none of the 10 rows of .* \(column prompt, label 'unsafe'\)"):
        public.load_rows("xstest")


def test_a_request_of_two_sets_makes_one_topic(served: dict, model: Path) -> None:
    """Row 3 of the second set is a row of the first but for case, spacing and a full stop, row 5 is its own row 4 again."""
    rows = prompt_rows()["train"]
    rows[3]["prompt"], rows[5]["prompt"] = "W20  w33 .", rows[4]["prompt"]
    served["walledai/StrongREJECT"] = {"train": rows}
    said: list[str] = []
    found = settings.collect("jailbreakbench,strongreject", load_tokenizer(model), (), said.append)
    made, hashes = found.pairs, found.hashes
    assert found.n_requests == 22
    assert [line for line in said if "left out" in line] == [
        "strongreject: 2 rows have a request that an earlier row or set has too (but for case, spacing or closing "
        "punctuation) and are left out, since topics must be independent"
    ]
    topics = {pair.topic for pair in made}
    assert "jailbreakbench-003" in topics and not {"strongreject-003", "strongreject-005"} & (topics | set(hashes))
    assert "strongreject-004" in topics and len(topics) == len({pair.treated for pair in made}) == 22
    assert all("w20" not in line for line in said)


def test_a_harmless_text_is_the_partner_of_one_topic_only(served: dict, model: Path) -> None:
    """Alpaca has every text twice, and one that is a harmless row of the other set."""
    twice = [{"instruction": f"w{4 + i % 15} w6 w7{' w8' * (i % 2)}", "input": ""} for i in range(60)]
    served["tatsu-lab/alpaca"] = {"train": [*twice, {"instruction": "w21 w31", "input": ""}]}
    made = settings.collect("jailbreakbench,strongreject", load_tokenizer(model), (), lambda _: None)
    controls = [pair.control for pair in made.pairs]
    assert len(controls) == 24 and len(set(controls)) == 24
    rows = public.load_rows("jailbreakbench")
    again = public.unseen(public.Rows(rows.harmful * 2, rows.harmless * 2), set())
    assert again == rows


def test_where_few_rows_have_the_length_of_their_partner_groups_are_interchanged(served: dict, model: Path) -> None:
    """Lengths alternate between the two sides, so that no row fits its own partner and nearly all fit another's."""
    sides = jbb()
    for i in range(12):
        sides["harmful"][i]["Goal"] = f"w20 w{30 + i}{' w4' if i % 2 else ''}"
        sides["benign"][i]["Goal"] = f"w21 w{30 + i}{'' if i % 2 else ' w4'}"
    served["JailbreakBench/JBB-Behaviors"] = sides
    tokenizer = load_tokenizer(model)
    said: list[str] = []
    found = settings.collect("jailbreakbench", tokenizer, wrappers_of(WRAPPERS[:1]), said.append)
    made, hashes = found.pairs, found.hashes
    assert said == [
        "jailbreakbench: 0 of 12 rows have the length of their own partner, so groups are interchanged: T1 takes a partner "
        "of equal length from all harmless rows of the set (12 pairs)"
    ]
    t1 = {pair.topic: pair for pair in made if pair.treatment == "T1"}
    assert len({pair.control for pair in t1.values()}) == 12 and len(hashes) == 24
    assert "T1: 12 of 12 requests" in public.survival(made, found.n_requests, tokenizer)[0]
    twin = next(pair for pair in made if pair.treatment == "T2b" and pair.topic == "jailbreakbench-004")
    assert twin.control == "w5 w6 w21 w34 w4 w7"  # the row's own partner, whatever T1 has
    rows = public.load_rows("jailbreakbench")
    assert public.grouped(rows, tokenizer, "x", said.append) != rows
    enough = public.Rows(rows.harmful, tuple(reversed(rows.harmless)))  # lengths fit now
    assert public.grouped(enough, tokenizer, "x", said.append) is enough


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def wrappers_of(rows: list[dict]) -> tuple[wrappers.Wrapper, ...]:
    return tuple(wrappers.Wrapper(**row) for row in rows)


@pytest.fixture
def asked(model: Path) -> dict[str, str]:
    return {"MODEL": str(model), "PROMPTS": "jailbreakbench", "DEVICE": "cpu", "DTYPE": "float32"}


@pytest.mark.parametrize("content", ["{", "[]", '{"comply": "w11", "refuse": ["w12"]}'])
def test_a_broken_outcome_beside_the_wrappers_is_named(
    served: dict, asked: dict, template_file: Path, content: str
) -> None:
    (template_file.parent / "outcome.json").write_text(content)
    with pytest.raises(InputError, match=r"outcome\.json"):
        settings.fetched(asked, str(template_file))


def test_an_own_outcome_is_shown_and_counts_as_it_is_now(
    served: dict, asked: dict, template_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = template_file.parent / "outcome.json"
    places = []
    for comply in (" w11", " w13"):
        own.write_text(json.dumps({"comply": [comply], "refuse": [" w12"]}))
        places.append(settings.fetched(asked, str(template_file))["PROMPTS"])
        said = capsys.readouterr().out
        assert said.count(f": comply '{comply}'; refuse ' w12' (joint probability 0.0") == 3
        assert pairs.load_set(places[-1]).outcomes["T2"] == ((comply,), (" w12",))
    assert len(set(places)) == 2
    assert settings.known(asked, str(template_file))["PROMPTS"] == places[1]
    own.write_text('{"comply": [" nosuchword"], "refuse": [" w12"]}')
    with pytest.raises(
        InputError,
        match=r"outcome\.json: outcome string ' nosuchword' starts with a word that the tokenizer does not know",
    ):
        settings.fetched(asked, str(template_file))
    own.unlink()
    with pytest.raises(InputError, match="is not made for"):
        settings.known(asked, str(template_file))


def test_own_openers_are_measured_on_the_prompts_of_their_treatment(
    served: dict, asked: dict, template_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"comply": [" w11"], "refuse": [" w12"]}
    own = {"T1": entry, "T2": entry, "T2b": {"comply": [" w13", " w14"], "refuse": [" w12"]}}
    (template_file.parent / "outcome.json").write_text(json.dumps(own))
    seen: list[list[str]] = []

    def probabilities(subject: object, texts: list[str]) -> torch.Tensor:
        seen.append(texts)
        return torch.tensor([0.0] * 11 + [0.5, 0.35, 0.02, 0.01]).expand(len(texts), -1)

    monkeypatch.setattr(openers, "first_token_probabilities", probabilities)
    settings.fetched(asked, str(template_file))
    said = capsys.readouterr().out
    for treatment in ("T1", "T2"):
        assert f"{treatment}: comply ' w11'; refuse ' w12' (joint probability 0.85)\n" in said
    assert "T2b: comply ' w13', ' w14'; refuse ' w12' (joint probability 0.38, below 0.8: edit outcome.json)" in said
    assert [texts[:2] for texts in seen] == [
        ["w21 w30 w4", "w20 w30"],
        ["w8 w9 w20 w30 w7", "w8 w9 w10 w20 w30"],
        ["w8 w9 w21 w30 w4 w7", "w8 w9 w10 w21 w30 w4"],
    ]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_where_the_models_first_words_are_not_known_the_place_named_for_ones_own_works(
    served: dict, asked: dict, template_file: Path, capsys: pytest.CaptureFixture[str], is_wrapped: bool
) -> None:
    given = str(template_file) if is_wrapped else None
    with pytest.raises(InputError, match=r"the model refused 0 of \d+ prompts") as caught:
        settings.fetched(asked, given)
    place = re.search(r"of your own into (.*), then the same command", str(caught.value))[1]
    Path(place).write_text('{"comply": [" w11"], "refuse": [" w12"]}')
    found = settings.fetched(asked, given)
    assert pairs.load_set(found["PROMPTS"]).outcomes["T1"] == ((" w11",), (" w12",))
    assert "T1: comply ' w11'; refuse ' w12' (joint probability" in capsys.readouterr().out


@pytest.mark.parametrize("lost", public.FILES)
def test_a_folder_that_lacks_a_file_is_made_anew_around_what_the_user_wrote(
    served: dict, asked: dict, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its note a set would no longer count as sensitive."""
    monkeypatch.setattr(openers, "find_openers", lambda *_: FoundOpeners(("w11",), ("w12",), 0.9, 3, 9))
    place = Path(settings.fetched(asked, None)["PROMPTS"])
    (place / "outcome.json").write_text('{"comply": [" w13"], "refuse": [" w12"]}')
    (place / lost).unlink()
    with pytest.raises(InputError, match="is not made for"):
        settings.known(asked, None)
    content = pairs.load_set(settings.fetched(asked, None)["PROMPTS"])
    assert all(pair.sensitive for pair in content.pairs) and len(content.pairs) == 12
    assert content.outcomes["T1"][0] == (("w11",) if lost == "outcome.json" else (" w13",))


def test_a_public_set_with_wrappers_goes_through_a_run_offline(
    served: dict, model: Path, template_file: Path, tmp_path: Path
) -> None:
    """By the command that users type, in a process of its own, once the set lies in the cache; no text is left behind."""
    served["JailbreakBench/JBB-Behaviors"] = jbb(30)
    (template_file.parent / "outcome.json").write_text('{"comply": [" w10", " w11"], "refuse": [" w12", " w13"]}')
    given = {"MODEL": str(model), "PROMPTS": "jailbreakbench", "DEVICE": "cpu", "DTYPE": "float32"}
    made = Path(settings.fetched(given, str(template_file))["PROMPTS"])
    (tmp_path / "prompts").symlink_to(made)
    places = {"COMPANION_RESULTS": str(tmp_path / "results"), "COMPANION_FIGURES": str(tmp_path / "figures")}
    words = [
        "--model",
        str(model),
        "--prompts",
        "jailbreakbench",
        "--wrappers",
        str(template_file),
        "--profile",
        "smoke",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "companion.run.cli", *words, "--only", "02", "--name", "mine"],
        cwd=ROOT, env={**os.environ, **places, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = pd.read_parquet(tmp_path / "results" / "mine" / "02_layers.parquet")
    assert set(found.treatment) == {"T1", "T2", "T2b", "T2-T2b"}
    n_files, leaks = texts_in(tmp_path, done.stdout + done.stderr)
    assert n_files > 10 and not leaks
