"""A prompt set made of public ones for a run: partners, wrappers, openers, and what is said. All rows are placeholders."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
from rows import jbb, prompt_rows
from toys import chat_folder
from transformers import PreTrainedTokenizerBase as Tokenizer

from companion.base import thresholds
from companion.base.errors import InputError
from companion.base.paths import ROOT
from companion.generation import openers
from companion.generation.openers import FoundOpeners
from companion.model.load import load_tokenizer
from companion.prompts import pairs, public, tokens
from companion.prompts.public import Wrapper
from companion.run import settings
from tests.test_nine_families import texts_in

FOUND = FoundOpeners(("w11",), ("w12",), 0.9, 3, 9)
WRAPPERS = (
    Wrapper("tale", "w5 w6 {request} w7", "w8 w9 {request} w7"),
    Wrapper("long", "w5 {request}", "w8 w9 w10 {request}"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture
def asked(model: Path) -> dict[str, str]:
    return {"MODEL": str(model), "PROMPTS": "jailbreakbench", "DEVICE": "cpu", "DTYPE": "float32"}


@pytest.fixture
def collect(served: dict, tokenizer: Tokenizer) -> Callable[..., tuple]:

    def collect(names: str, *templates: Wrapper) -> tuple:
        made = settings.collect(names, tokenizer, templates)
        return made, made.notes

    return collect


@pytest.fixture
def template_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine" / public.WRAPPERS
    file.parent.mkdir()
    file.write_text("".join(json.dumps(asdict(wrapper)) + "\n" for wrapper in WRAPPERS))
    return file


def test_partners_by_order_are_no_twins_and_lost_rows_are_counted(collect: Callable[..., tuple]) -> None:
    made, said = collect("xstest", *WRAPPERS)
    assert "xstest: 1 of 5 harmful rows have no harmless partner of their category" in said
    assert Counter(pair.treatment for pair in made.pairs) == {"T1": 4, "T2": 10} and made.n_requests == 5
    assert not [pair for pair in made.pairs if pair.twin]


def test_a_set_is_made_with_wrappers_twins_and_hashes(served, asked, template_file, monkeypatch, capsys):
    find = Mock(return_value=FoundOpeners(("w11",), ("w12",), 0.7, 3, 9))
    monkeypatch.setattr(openers, "find_openers", find)
    given = asked | {"PROMPTS": "jailbreakbench,advbench"}
    with pytest.raises(InputError, match="is not made for"):
        settings.known(given, str(template_file))
    found = settings.fetched(given, str(template_file))
    content = pairs.load_set(found["PROMPTS"])
    by_id = {pair.id: pair for pair in content.pairs}
    t2 = by_id["jailbreakbench-004-t2-tale"]
    assert (t2.control, t2.treated) == ("w5 w6 w20 w34 w7", "w8 w9 w20 w34 w7")
    assert by_id[t2.twin].treated == "w8 w9 w21 w34 w7" and by_id[t2.twin].topic == t2.topic == "jailbreakbench-004"
    assert (by_id["jailbreakbench-004-t1"].control, by_id["jailbreakbench-004-t1"].treated) == ("w21 w34", "w20 w34")
    assert {"w20 w30", "w8 w9 w20 w30 w7"} <= set(find.call_args.args[1])
    said = capsys.readouterr().out
    assert "left out: advbench is gated" in said and "T2: 12 of 24 pairs" in said
    assert said.count("joint probability") == said.count("below 0.8: edit outcome.json") == 1
    assert not [pair for pair in content.pairs if pair.control in said or pair.treated in said]
    rows = json.loads((Path(found["PROMPTS"]) / "set.json").read_text())["rows"]
    assert len(rows) == 24 and rows["jailbreakbench-harmless-004"] == hashlib.sha256(b"w21 w34").hexdigest()
    (Path(found["PROMPTS"]) / "outcome.json").write_text('{"comply": [" w13"], "refuse": [" w12"]}')
    assert settings.fetched(given, str(template_file)) == found == settings.known(given, str(template_file)) | found
    again = capsys.readouterr().out
    assert "when it was made: left out: advbench is gated" in again, "said at every run"
    assert settings.fetched(given, None)["PROMPTS"] != found["PROMPTS"]


def test_harmful_rows_alone_get_partners_of_equal_length(collect, model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(openers, "find_openers", lambda *_: FOUND)
    made, _ = collect("strongreject", *WRAPPERS)
    t1 = [pair for pair in made.pairs if pair.treatment == "T1"]
    assert len(t1) == 12 == len({pair.control for pair in t1})
    assert all(tokens.token_pair(pair, tokenizer)[0] is not None for pair in t1)
    assert {pair.treatment for pair in made.pairs} == {"T1", "T2"} and not [pair for pair in made.pairs if pair.twin]
    folder = public.folder("strongreject", str(model), None)
    settings.ensure(folder, "strongreject", str(model), None, device="cpu", dtype="float32")
    assert f"C1, C2, C4 to C7: {thresholds.NO_WRAPPERS}\n" in capsys.readouterr().out


def test_a_request_without_a_partner_of_its_length_is_counted_and_has_its_wrappers(served, collect, tokenizer):
    rows = prompt_rows()["train"]
    for row in rows[:7]:
        row["prompt"] += " w5 w6 w7 w8 w9"
    served["walledai/StrongREJECT"] = {"train": rows}
    made, _ = collect("strongreject", WRAPPERS[0])
    assert Counter(pair.treatment for pair in made.pairs) == {"T1": 5, "T2": 12}
    treated = {pair.id: pair.treated for pair in made.pairs}
    assert treated["strongreject-000-t2-tale"].startswith("w8 w9 w22 w30") and "strongreject-000" in made.hashes
    t1, t2 = public.survival(made.pairs, made.n_requests, tokenizer)
    assert t1.startswith("T1: 5 of 12 requests have a benign partner of their length and can be interchanged; few")
    assert "take harmless partners by length (+alpaca)" in t1 and t2.startswith("T2: 12 of 12 pairs have equal token")


def test_a_set_left_out_for_want_of_partners_takes_no_request_from_another(served: dict, collect) -> None:
    del served["tatsu-lab/alpaca"]
    served["walledai/StrongREJECT"] = {"train": [{"prompt": row["Goal"], "category": "k"} for row in jbb()["harmful"]]}
    made, said = collect("strongreject,jailbreakbench")
    assert len(made.pairs) == made.n_requests == 12 and len(said) == 2
    assert said[0].startswith("left out: strongreject, which takes harmless partners from alpaca: alpaca is gated")


def test_equal_requests_are_left_out_and_near_copies_are_one_topic(served: dict, collect) -> None:
    """Row 3 of the second set is a row of the first but for case, spacing and a full stop, row 5 is its own row 4 again."""
    rows = prompt_rows()["train"]
    rows[3]["prompt"], rows[5]["prompt"] = "W20  w33 .", rows[4]["prompt"]
    served["walledai/StrongREJECT"] = {"train": rows}
    found, said = collect("jailbreakbench,strongreject")
    assert found.n_requests == 22
    (line,) = (line for line in said if "left out" in line)
    assert (
        line.startswith("strongreject: 2 rows have a request that an earlier row or set has too") and "w20" not in line
    )
    topics = {pair.topic for pair in found.pairs}
    assert {"jailbreakbench-003", "strongreject-004"} <= topics and len(topics) == 22
    assert not {"strongreject-003", "strongreject-005"} & (topics | set(found.hashes))
    rows = prompt_rows()["train"]
    rows[7]["prompt"], rows[9]["prompt"] = rows[2]["prompt"] + " w9", rows[2]["prompt"] + " w8 w9"
    served["walledai/StrongREJECT"] = {"train": rows}
    made, said = collect("strongreject", WRAPPERS[0])
    assert "10 topics of 12 requests: those that share 0.6 of their words are one topic" in said
    named = {pair.id: pair.topic for pair in made.pairs if pair.treatment == "T2"}
    assert len(set(named.values())) == 10 and made.n_requests == 12
    assert [named[f"strongreject-{n:03d}-t2-tale"][-3:] for n in (2, 7, 9)] == ["002"] * 3


def test_where_few_rows_have_the_length_of_their_partner_groups_are_interchanged(served, collect, tokenizer):
    """Lengths alternate between the two sides, so that no row fits its own partner and nearly all fit another's."""
    sides = jbb()
    for i in range(12):
        sides["harmful"][i]["Goal"] = f"w20 w{30 + i}{' w4' if i % 2 else ''}"
        sides["benign"][i]["Goal"] = f"w21 w{30 + i}{'' if i % 2 else ' w4'}"
    served["JailbreakBench/JBB-Behaviors"] = sides
    found, said = collect("jailbreakbench", WRAPPERS[0])
    assert len(said) == 2 and said[0].startswith("jailbreakbench: 0 of 12 rows have the length of their own partner")
    assert len({pair.control for pair in found.pairs if pair.treatment == "T1"}) == 12 and len(found.hashes) == 24
    assert "T1: 12 of 12 requests" in public.survival(found.pairs, found.n_requests, tokenizer)[0]
    twin = next(pair for pair in found.pairs if pair.treatment == "T2b" and pair.topic == "jailbreakbench-004")
    assert twin.control == "w5 w6 w21 w34 w4 w7"  # the row's own partner, whatever T1 has


def test_where_the_models_first_words_are_not_known_ones_own_can_be_given(served, asked, template_file):
    given = str(template_file)
    with pytest.raises(InputError, match=r"the model refused 0 of \d+ prompts") as caught:
        settings.fetched(asked, given)
    place = re.search(r"of your own into (.*), then the same command", str(caught.value))[1]
    Path(place).write_text('{"comply": [" w11"], "refuse": [" w12"]}')
    found = settings.fetched(asked, given)
    assert pairs.load_set(found["PROMPTS"]).outcomes["T1"] == ((" w11",), (" w12",))


@pytest.mark.parametrize("lost", public.FILES)
def test_a_folder_that_lacks_a_file_is_made_anew_around_what_the_user_wrote(served, asked, lost, monkeypatch):
    """Without its note a set would no longer count as sensitive."""
    monkeypatch.setattr(openers, "find_openers", lambda *_: FOUND)
    place = Path(settings.fetched(asked, None)["PROMPTS"])
    (place / "outcome.json").write_text('{"comply": [" w13"], "refuse": [" w12"]}')
    (place / lost).unlink()
    with pytest.raises(InputError, match="is not made for"):
        settings.known(asked, None)
    content = pairs.load_set(settings.fetched(asked, None)["PROMPTS"])
    assert all(pair.sensitive for pair in content.pairs) and len(content.pairs) == 12
    assert content.outcomes["T1"][0] == (("w11",) if lost == "outcome.json" else (" w13",))


def test_a_public_set_with_wrappers_goes_through_a_run_offline(served, asked, template_file, tmp_path, monkeypatch):
    served["JailbreakBench/JBB-Behaviors"] = jbb(30)
    monkeypatch.setattr(openers, "find_openers", lambda *_: FOUND)
    place = Path(settings.fetched(asked, str(template_file))["PROMPTS"])
    (place / "outcome.json").write_text('{"comply": [" w10", " w11"], "refuse": [" w12", " w13"]}')
    (tmp_path / "prompts").symlink_to(place)
    places = {"COMPANION_RESULTS": str(tmp_path / "results"), "COMPANION_FIGURES": str(tmp_path / "figures")}
    words = f"--model {asked['MODEL']} --prompts jailbreakbench --wrappers {template_file} --profile smoke --only 02 --name x"
    command = [sys.executable, "-m", "companion.run.cli", *words.split()]
    variables = {**os.environ, **places, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = pd.read_parquet(tmp_path / "results" / "x" / "02_layers.parquet")
    assert set(found.treatment) == {"T1", "T2", "T2b", "T2-T2b"}
    n_files, leaks = texts_in(tmp_path, done.stdout + done.stderr)
    assert n_files > 10 and not leaks
