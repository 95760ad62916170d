"""Whatever is in the files and flags that a user hands in, the answer is a result or one clear sentence, never a traceback."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from companion.base import folders, hub, paths
from companion.base.errors import InputError
from companion.generation import labels
from companion.prompts import pairs, wrappers
from companion.run import flags
from companion.run.settings import check_prompts

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)  # fmt: skip
JSON = VALUES.map(lambda value: json.dumps(value).encode())
FIELDS = st.sampled_from([*pairs.REQUIRED, *pairs.OPTIONAL, "other"])
NAMES = st.text(max_size=120) | st.text(alphabet="./\\~ab\0\n -", min_size=1, max_size=12)
WORDS = st.sampled_from(
    ["--model", "--prompts", "--wrappers", "--judge", "--name", "--pairs", "--device", "--dtype", "--only", "--profile",
     "--models", "--shards", "--force", "--list", "--figures", "--trust-remote-code"]
)  # fmt: skip


def pair(number: int, **changes: Any) -> dict[str, Any]:
    same = {"id": f"p{number}", "treatment": "T1", "topic": f"t{number}", "control": "say a", "treated": "say b"}
    return same | changes


def answered(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or the InputError's text: one that says something."""
    try:
        return call(*arguments)
    except InputError as error:
        assert len(str(error)) > 15
        return str(error)


def written(folder: Path, pairs: bytes, outcome: bytes) -> Path:
    (folder / "pairs.jsonl").write_bytes(pairs)
    (folder / "outcome.json").write_bytes(outcome)
    return folder


GOOD = ("\n".join(json.dumps(pair(n)) for n in range(12)) + "\n").encode()
OUTCOME = b'{"comply": ["a"], "refuse": ["b"]}'


def with_rows(folder: Path, *rows: object) -> Any:
    """What reading a prompt set with these rows behind good ones answers."""
    found = answered(pairs.load_set, written(folder, GOOD + "\n".join(map(json.dumps, rows)).encode(), OUTCOME))
    assert isinstance(found, pairs.PromptSet) or "pairs.jsonl" in found or "outcome.json" in found
    return found


@quick
@given(extra=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=3), is_whole=st.booleans())
def test_a_strange_pair(tmp_path: Path, extra: dict[str, Any], is_whole: bool) -> None:
    with_rows(tmp_path, (pair(99) if is_whole else {}) | extra)


@quick
@given(spans=st.dictionaries(st.sampled_from(["control", "treated", "x"]), VALUES, max_size=2), twin=SCALARS)
def test_strange_spans_and_twins(tmp_path: Path, spans: dict[str, Any], twin: Any) -> None:
    with_rows(tmp_path, pair(99, spans=spans, twin=twin, treatment="T2"))


@quick
@given(content=st.binary(max_size=60) | JSON)
def test_a_strange_pairs_file_or_outcome_file(tmp_path: Path, content: bytes) -> None:
    for files in ((GOOD + content, OUTCOME), (content, OUTCOME), (GOOD, content)):
        found = answered(pairs.load_set, written(tmp_path, *files))
        assert isinstance(found, pairs.PromptSet) or "pairs.jsonl" in found or "outcome.json" in found


@pytest.mark.parametrize("name", ["t2", "T2B", " T1", "B0", "B", "harm"])
def test_an_unknown_treatment_is_named(tmp_path: Path, name: str) -> None:
    """It would serve no claim, and the verdict would name something else as missing."""
    found = with_rows(tmp_path, pair(99, treatment=name))
    assert repr(name) in found and "line 13" in found


def test_a_twin_of_another_topic_is_named(tmp_path: Path) -> None:
    twin, harmful = pair(98, treatment="T2b"), pair(99, treatment="T2", twin="p98")
    assert "twins share a topic" in with_rows(tmp_path, twin, harmful)
    assert isinstance(with_rows(tmp_path, twin | {"topic": "t99"}, harmful), pairs.PromptSet)


@quick
@given(words=st.lists(WORDS | NAMES | st.integers().map(str), max_size=6))
def test_strange_flags(words: list[str]) -> None:
    found = answered(flags.parse, words)
    if not isinstance(found, str):
        assert isinstance(answered(flags.parameters, found, "cpu"), dict | str)


@quick
@given(name=NAMES)
@example(name="--")
def test_a_strange_name_model_or_prompt_set(name: str) -> None:
    """A run's name never leads out of the results."""
    for flag in ("name", "model", "prompts"):
        found = answered(lambda flag: flags.parameters(flags.parse([f"--{flag}={name}", "--pairs=20"]), "cpu"), flag)
        assert isinstance(found, dict | str)
        if flag == "name" and isinstance(found, dict):
            folder = (paths.RESULTS / found["SLUG"]).resolve()
            assert folder.parent == paths.RESULTS and folder != paths.RESULTS


@quick
@given(content=st.binary(max_size=80) | st.text(alphabet=string.printable, max_size=80).map(str.encode))
def test_a_strange_list_of_models(tmp_path: Path, content: bytes) -> None:
    for text in (content, b"models:\n- " + content, b"models:\n- name: " + content):
        (tmp_path / "models.yml").write_bytes(text)
        found = answered(flags.read_model_list, tmp_path / "models.yml")
        assert isinstance(found, list) or "models.yml" in found


@quick
@given(entry=st.dictionaries(st.sampled_from([*flags.KEYS, "x"]), VALUES, max_size=4))
def test_a_strange_entry(tmp_path: Path, entry: dict[str, Any]) -> None:
    (tmp_path / "models.yml").write_text(json.dumps({"models": [entry]}), encoding="utf-8")
    found = answered(flags.read_model_list, tmp_path / "models.yml")
    assert isinstance(found, str) or all(word.startswith("--") for word in found[0])


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "architectures": VALUES | st.lists(st.sampled_from(["LlamaForCausalLM", "BertModel", None, 1]), max_size=2),
        "auto_map": VALUES,
        "model_type": VALUES | st.just("llama"),
        "quantization_config": VALUES,
    },
)


@quick
@given(settings=SETTINGS)
@example(settings={"architectures": [None]})
@example(settings={"architectures": 5})
@example(settings={"auto_map": {}, "model_type": ["llama"]})
def test_strange_settings_of_a_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = answered(folders.check_config, tmp_path)
    assert found is None or str(tmp_path) in found
    if set(settings) == {"architectures"} and "LlamaForCausalLM" in str(settings):
        assert found is None


@quick
@given(config=st.binary(max_size=40) | JSON)
def test_a_strange_config(tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for name in ("tokenizer_config.json", "model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(config)
        answered(folders.check_model, str(tmp_path))


HEADERS = st.dictionaries(st.text(max_size=5), VALUES | st.fixed_dictionaries({"data_offsets": VALUES}), max_size=3)


@quick
@given(header=HEADERS)
@example(header={"a": {"data_offsets": ["0", "4"]}})
@example(header={"a": {"data_offsets": [0, None]}})
def test_a_strange_header_of_weights(tmp_path: Path, header: dict[str, Any]) -> None:
    for text in (json.dumps(header), "[" * 100_000):
        data = text.encode()
        (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
        answered(folders.check_weights, tmp_path)


@quick
@given(content=st.binary(max_size=60) | st.lists(JSON, max_size=3).map(b"\n".join))
def test_strange_wrappers_labels_and_lists_of_weights(tmp_path: Path, content: bytes) -> None:
    for name in (wrappers.FILE, "labels.csv", hub.INDEX):
        (tmp_path / name).write_bytes(content if name != "labels.csv" else b"id,label\n" + content)
    answered(wrappers.read_wrappers, tmp_path)
    answered(labels.read_labels, tmp_path / "labels.csv")
    names = answered(hub.weight_files, tmp_path)
    assert isinstance(names, str) or all(Path(name).name == name for name in names)


STRANGE = {
    "nested": "[" * 100_000,
    "digits": "1" * 5000,
    "half a pair": '{"id": "\\ud800", "topic": "\\ud800", "sensitive": "\\ud800"}',
    "no number": "NaN",
}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_json_that_breaks_its_reader_or_what_comes_after(tmp_path: Path, text: str) -> None:
    """In every file of JSON that a user hands in; such inputs are too rare for chance to find."""
    for name in ("config.json", "tokenizer_config.json", hub.INDEX, "model.safetensors", wrappers.FILE, "set.json"):
        (tmp_path / name).write_text(text)
    asked = [(pairs.load_set, GOOD + text.encode(), OUTCOME), (pairs.load_set, GOOD, text.encode())]
    for call in (
        folders.check_model,
        folders.check_config,
        folders.check_chat,
        hub.weight_files,
        wrappers.read_wrappers,
    ):
        asked.append((call, GOOD, OUTCOME))
    for call, *files in asked:
        place = written(tmp_path, *files)
        found = answered(call, str(place) if call is folders.check_model else place)
        assert isinstance(found, str) and "\n" not in found, call
    assert pairs.load_set(written(tmp_path, GOOD, OUTCOME)).pairs[0].sensitive  # what its note says cannot be read


def test_links_out_of_the_folder_and_in_a_circle_and_a_folder_for_a_file(tmp_path: Path) -> None:
    """What a link leads to is read like a file, and never quoted; a circle is no file."""
    secret, place = tmp_path / "secret.txt", tmp_path / "set"
    secret.write_text("word17 word18\n")
    place.mkdir()
    calls = {"pairs.jsonl": pairs.load_set, "outcome.json": pairs.load_set, "config.json": folders.check_model}
    for name, call in calls.items():
        path = written(place, GOOD, OUTCOME) / name
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
        found = answered(call, str(place))
        assert name in found and "word17" not in found
        path.unlink()
        path.symlink_to(path)
        assert f"no {name}" in answered(call, str(place))
        path.unlink()
        path.mkdir()
        assert f"no {name}" in answered(call, str(place))
        path.rmdir()
    (place / "loop").symlink_to(place / "loop")
    for call in (folders.check_model, check_prompts):
        assert str(place / "loop") in answered(call, str(place / "loop"))
    assert secret.read_text() == "word17 word18\n"
