"""The name of a run, a judge, loaded or refused before a notebook starts, and prompt sets made of public ones for a run."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from models import edit_json, tiny_model, tiny_tokenizer
from rows import jbb, prompt_rows
from toys import EMBEDDED, PAIRS, TEMPLATE, Toy, chat_folder, prompt_set
from transformers import PreTrainedTokenizerBase as Tokenizer

from companion.base import gguf, hub, paths, thresholds
from companion.base.errors import InputError
from companion.base.paths import ORGANISM, ROOT
from companion.generation import labels, openers
from companion.generation.openers import FoundOpeners
from companion.model import memory
from companion.model.load import load_tokenizer
from companion.prompts import pairs, public, tokens
from companion.prompts.public import Wrapper
from companion.run import cli, freshness, runner, settings
from companion.run.cli import parameters, parse
from tests.test_nine_families import texts_in

LINE = '{"family": "f", "neutral": "a {request}", "jailbreak": "b {request}"}'


def named(*words: str) -> str:
    return str(parameters(parse(words), "cpu")["SLUG"])


def made(*words: str) -> str:
    """The name of a run whose first result has taken its place."""
    flags, name = parse(words), named(*words)
    note = settings.made_from(parameters(flags, "cpu"), flags.judge, flags.wrappers)
    freshness.note(paths.RESULTS / name, runner.MADE_FROM, note)
    return name


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders, each with a model, a prompt set and wrappers that are called the same."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    for name in ("one", "two"):
        shutil.copytree(ORGANISM / "window-1", tmp_path / name / "model")
        prompt_set(tmp_path / name / "set", PAIRS)
        (tmp_path / name / "own.jsonl").write_text(LINE)
    return tmp_path / "one", tmp_path / "two"


def test_wrappers_are_in_the_name(places: tuple[Path, Path]) -> None:
    file = places[0] / "own.jsonl"
    shutil.copy(file, places[0] / "wrappers.jsonl")
    with pytest.raises(InputError, match="--wrappers goes with a public prompt set"):
        named("--wrappers", str(file))
    for place, end in ((file, "own"), (places[0], "one")):
        assert named("--prompts", "xstest", "--wrappers", str(place)) == f"smollm2-refuser-xstest-wrappers-{end}"


FLAGS = {
    "model": ("--model", "{}/model"), "prompts": ("--prompts", "{}/set"),
    "wrappers": ("--prompts", "xstest", "--wrappers", "{}/own.jsonl"), "judge": ("--judge", "{}/model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLAGS)
def test_what_lies_elsewhere_needs_another_name(places: tuple[Path, Path], kind: str) -> None:
    one, two = ([word.format(place) for word in FLAGS[kind]] for place in places)
    slug = named(*two)
    assert made(*one) == slug
    with pytest.raises(InputError, match=rf"were made with {kind} .*one/.* now it would be {kind} .*two/.*--name"):
        named(*two)
    assert named(*two, "--name", "other") == "other" and named(*one) == slug
    moved = places[0].rename(places[0].with_name("moved"))
    assert named(*(word.format(moved) for word in FLAGS[kind])) == slug


def test_one_name_is_for_one_model_set_wrappers_and_judge(places: tuple[Path, Path]) -> None:
    first = ("--name", "x", "--model", "org/m@v1", "--prompts", "xstest+alpaca")
    made(*first)
    for words, message in (  # of a flag that is given twice the last counts
        (("--model", "org/n"), "with model org/m, and now it would be model org/n"),
        (("--prompts", "xstest"), r"with prompts xstest\+alpaca, .* be prompts xstest"),
        (("--wrappers", str(places[0] / "own.jsonl")), "with no wrappers, and now it would be wrappers /"),
        (("--judge", "full-0"), "no judge, .* data/organism/full-0"),
    ):
        with pytest.raises(InputError, match=message):
            named(*first, *words)
    assert named(*first, "--model", "org/m@v2") == "x"  # a revision is no other model


def test_the_first_result_takes_the_name_and_a_failure_does_not(toy: Toy, tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    sets = (prompt_set(tmp_path / place / "set", PAIRS) for place in ("one", "two"))
    one, two = (("--prompts", str(place), "--only", "01") for place in sets)
    toy.write("01", "raise ValueError('no')")
    assert toy.run(*one).returncode == 1
    toy.write("01")
    assert toy.run(*two).returncode == 0
    before = toy.contents()
    for words in (one, ("--list", *one[:2]), ("--figures", *one[:2])):
        done = toy.run(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "the results of 'embedded-set' were made with prompts" in done.stderr and "--name" in done.stderr
    assert toy.contents() == before


def test_another_judge_and_a_changed_file_of_the_users_make_everything_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    places = [tmp_path / name for name in ("model", "adapter", "set", "tokenizer", "judge")]
    for place in places:
        place.mkdir()
        (place / "adapter_config.json").write_text("{}")
    keys = []
    for judge in ("", "window-1", "window-0", f"org/judge@{'0' * 40}", f"org/judge@{'1' * 40}", str(places[4])):
        monkeypatch.setenv(hub.JUDGE, judge)
        keys.append(runner.make_plan(EMBEDDED).keys)
    monkeypatch.setenv(gguf.TOKENIZER, str(places[3]))
    for place in places:
        (place / "adapter_config.json").write_text("{ }")
        keys.append(runner.make_plan(EMBEDDED | {"MODEL": f"{places[0]}+{places[1]}", "PROMPTS": str(places[2])}).keys)
    assert all(len({one[number] for one in keys}) == len(keys) for number in keys[0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: int(0.9 * path.stat().st_size)])


def words(folder: Path, named: dict[int, str]) -> None:
    tokenizer = tiny_tokenizer(folder, named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def judge_folder(place: Path) -> Path:
    """A judge with random weights, which knows the words Yes and No."""
    folder = place / "judge"
    words(folder, {7: "Yes", 9: "No"})
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    return folder


SEEN = "cut off or no safetensors", "has no tokenizer files"  # by every command, from the files alone
DAMAGES: dict[str, Callable[[Path], object]] = {
    SEEN[0]: lambda folder: cut(folder / "model.safetensors"),
    SEEN[1]: lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "Yes and No do not begin with known tokens of their own": lambda folder: words(folder, {}),
    "judge reads at most 64 tokens, and the question with a request": lambda folder: edit_json(
        folder / "config.json", max_position_embeddings=64
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_judge_that_cannot_be_loaded_is_named_before_the_model_is(tmp_path, message, monkeypatch, capsys):
    folder = judge_folder(tmp_path)
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    flags = ["--model", "full-0", "--judge", str(folder)]
    capsys.readouterr()  # saving the folder draws a bar of progress
    assert cli.main(["--list", *flags]) == 0 and capsys.readouterr().err == ""
    DAMAGES[message](folder)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: pytest.fail("a notebook was started"))
    for words in [[], ["--list"], ["--figures"]] if message in SEEN else [[]]:
        assert cli.main([*words, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("run_all.sh: --judge: ") and message in error and error.count("\n") == 1


def test_a_judge_must_fit_and_nothing_is_compared_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = judge_folder(tmp_path)
    judge = memory.run_memory(memory.on_meta(folder, torch.bfloat16), copies=1)
    assert judge.copies == judge.weights
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: judge.total)
    assert settings._ready_judge(str(folder), "cpu") == str(folder)
    assert labels.judge_model.__wrapped__(str(folder), "cpu").n_layers == 4
    monkeypatch.setattr(memory, "free_memory", lambda device: judge.total - 1)
    with pytest.raises(InputError, match="--judge: judge is too large for cpu"):
        settings._ready_judge(str(folder), "cpu")


def test_a_run_with_an_adapter_has_a_name_and_a_place_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    found = cli.parameters(cli.parse(["--adapter", str(folder), "--model", "full-0"]), "cpu")
    assert found["MODEL"] == f"full-0+{folder}" and found["SLUG"] == "full-0-adapter-mine"
    assert settings.made_from(found, None, None)["model"] == f"data/organism/full-0+{folder}"
    manifest = freshness._model(found["MODEL"], {})
    assert manifest["name"] == "full-0" and set(manifest["adapter"]["sha256"]) == {p.name for p in folder.iterdir()}


# ---- a prompt set made of public ones; all rows are placeholders ----

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
def collect(served: dict, tokenizer: Tokenizer) -> Callable[..., settings.Collected]:
    return lambda names, *templates: settings.collect(names, tokenizer, templates)


@pytest.fixture
def template_file(tmp_path: Path) -> Path:
    file = tmp_path / "mine" / public.WRAPPERS
    file.parent.mkdir()
    file.write_text("".join(json.dumps(asdict(wrapper)) + "\n" for wrapper in WRAPPERS))
    return file


def test_partners_by_order_are_no_twins_and_lost_rows_are_counted(collect) -> None:
    made = collect("xstest", *WRAPPERS)
    assert "xstest: 1 of 5 harmful rows have no harmless partner of their category" in made.notes
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
    made = collect("strongreject", *WRAPPERS)
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
    made = collect("strongreject", WRAPPERS[0])
    assert Counter(pair.treatment for pair in made.pairs) == {"T1": 5, "T2": 12}
    treated = {pair.id: pair.treated for pair in made.pairs}
    assert treated["strongreject-000-t2-tale"].startswith("w8 w9 w22 w30") and "strongreject-000" in made.hashes
    t1, t2 = public.survival(made.pairs, made.n_requests, tokenizer)
    assert t1.startswith("T1: 5 of 12 requests have a benign partner of their length and can be interchanged; few")
    assert "take harmless partners by length (+alpaca)" in t1 and t2.startswith("T2: 12 of 12 pairs have equal token")


def test_a_set_left_out_for_want_of_partners_takes_no_request_from_another(served: dict, collect) -> None:
    del served["tatsu-lab/alpaca"]
    served["walledai/StrongREJECT"] = {"train": [{"prompt": row["Goal"], "category": "k"} for row in jbb()["harmful"]]}
    made = collect("strongreject,jailbreakbench")
    assert len(made.pairs) == made.n_requests == 12 and len(made.notes) == 2
    assert made.notes[0].startswith(
        "left out: strongreject, which takes harmless partners from alpaca: alpaca is gated"
    )


def test_equal_requests_are_left_out_and_near_copies_are_one_topic(served: dict, collect) -> None:
    """Row 3 of the second set is a row of the first but for case, spacing and a full stop, row 5 is its own row 4 again."""
    rows = prompt_rows()["train"]
    rows[3]["prompt"], rows[5]["prompt"] = "W20  w33 .", rows[4]["prompt"]
    served["walledai/StrongREJECT"] = {"train": rows}
    found = collect("jailbreakbench,strongreject")
    (line,) = (line for line in found.notes if "left out" in line)
    assert line.startswith("strongreject: 2 rows have a request that an earlier row or set has too")
    assert found.n_requests == 22 and "w20" not in line
    topics = {pair.topic for pair in found.pairs}
    assert {"jailbreakbench-003", "strongreject-004"} <= topics and len(topics) == 22
    assert not {"strongreject-003", "strongreject-005"} & (topics | set(found.hashes))
    rows = prompt_rows()["train"]
    rows[7]["prompt"], rows[9]["prompt"] = rows[2]["prompt"] + " w9", rows[2]["prompt"] + " w8 w9"
    served["walledai/StrongREJECT"] = {"train": rows}
    made = collect("strongreject", WRAPPERS[0])
    assert "10 topics of 12 requests: those that share 0.6 of their words are one topic" in made.notes
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
    found = collect("jailbreakbench", WRAPPERS[0])
    first, _ = found.notes
    assert first.startswith("jailbreakbench: 0 of 12 rows have the length of their own partner")
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
