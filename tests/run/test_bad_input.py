"""Whatever is in the files and flags that a user hands in, the answer is a result or one clear sentence, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from companion.base import folders, hub, paths
from companion.base.errors import InputError
from companion.prompts import pairs, public
from companion.run import cli
from companion.run.settings import check_prompts

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip
NAMES = st.text(max_size=120) | st.text(alphabet="./\\~ab\0\n -", min_size=1, max_size=12)
WORDS = st.sampled_from(
    [name for action in cli.parser()._actions for name in action.option_strings[-1:] if name != "--help"]
)


def pair(number: int, **changes: Any) -> dict[str, Any]:
    same = {"id": f"p{number}", "treatment": "T1", "topic": f"t{number}", "control": "say a", "treated": "say b"}
    return same | changes


GOOD = ("\n".join(json.dumps(pair(n)) for n in range(12)) + "\n").encode()
OUTCOME = b'{"comply": ["a"], "refuse": ["b"]}'
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'


def header(text: str) -> bytes:
    """The beginning of a file of weights whose header is `text`."""
    return len(text.encode()).to_bytes(8, "little") + text.encode()


def keyed(*names: str, values: st.SearchStrategy = VALUES) -> st.SearchStrategy:
    return st.dictionaries(st.sampled_from(names), values, max_size=4)


SPANS = keyed("control", "treated", "x")
ROWS = keyed(*pairs.REQUIRED, *pairs.OPTIONAL, "other") | st.builds(
    dict, spans=SPANS, twin=VALUES, treatment=st.just("T2")
)
SETTINGS = keyed("architectures", "auto_map", "model_type", "quantization_config", values=VALUES | st.just([None]))
OFFSETS = VALUES | st.just(["0", "4"]) | st.just([0, None])
HEADERS = st.dictionaries(st.text(max_size=5), st.fixed_dictionaries({"data_offsets": OFFSETS}) | VALUES, max_size=3)
# What breaks a reader of JSON or what comes after; such inputs are too rare for chance to find.
RARE = st.sampled_from(
    ['{"id": "\\ud800", "topic": "\\ud800", "sensitive": "\\ud800"}', "NaN", "1" * 5000, "[" * 100_000]
)
# File, what reads its folder, and what is in it, besides any bytes.
FILES: dict[str, tuple[Callable[[Path], Any], st.SearchStrategy]] = {
    "pairs.jsonl": (pairs.load_set, ROWS.map(lambda row: GOOD + json.dumps(pair(99) | row).encode())),
    "outcome.json": (pairs.load_set, VALUES),
    "set.json": (pairs.load_set, VALUES),
    "config.json": (folders.check_config, SETTINGS),
    "tokenizer_config.json": (lambda folder: folders.check_model(str(folder)), VALUES),
    "model.safetensors": (folders.check_weights, (HEADERS.map(json.dumps) | RARE).map(header)),
    hub.INDEX: (hub.weight_files, VALUES),
    public.WRAPPERS: (public.read_wrappers, VALUES),
    "models.yml": (
        lambda folder: cli.read_model_list(folder / "models.yml"),
        keyed(*cli.KEYS, "x").map(lambda entry: {"models": [entry]}) | st.binary().map(b"models:\n- name: ".__add__),
    ),
}


def answered(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or the InputError's text: one that says something."""
    try:
        return call(*arguments)
    except InputError as error:
        assert len(str(error)) > 15
        return str(error)


@pytest.mark.parametrize("name", FILES)
@quick
@given(data=st.data())
def test_a_strange_file(tmp_path: Path, name: str, data: st.DataObject) -> None:
    reads, contents = FILES[name]
    for file, whole in {"pairs.jsonl": GOOD, "outcome.json": OUTCOME, "config.json": CONFIG}.items():
        (tmp_path / file).write_bytes(whole)
    content = data.draw(contents | RARE | st.binary(max_size=80))
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    found = answered(reads, tmp_path)
    assert not isinstance(found, str) or any(file in found for file in (*FILES, str(tmp_path)))
    if isinstance(found, pairs.PromptSet) and name == "set.json" and text in ("NaN", "[" * 100_000):
        assert found.pairs[0].sensitive  # what its note says cannot be read


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        *(([pair(99, treatment=name)], repr(name)) for name in ("t2", "T2B", " T1", "B0", "harm")),
        ([pair(98, treatment="T2b"), pair(99, treatment="T2", twin="p98")], "twins share a topic"),
    ],
)
def test_a_pair_that_would_serve_no_claim_is_named(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(GOOD + "\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "outcome.json").write_bytes(OUTCOME)
    found = answered(pairs.load_set, tmp_path)
    assert said in found and ("line 13" in found or "pair 'p99'" in found)


@quick
@given(words=st.lists(WORDS | NAMES | st.integers().map(str), max_size=6))
def test_strange_flags(words: list[str]) -> None:
    found = answered(cli.parse, words)
    if not isinstance(found, str):
        assert isinstance(answered(cli.parameters, found, "cpu"), dict | str)


@quick
@given(name=NAMES)
@example(name="--")
def test_a_strange_name_model_or_prompt_set(name: str) -> None:
    for flag in ("name", "model", "prompts"):
        found = answered(lambda flag: cli.parameters(cli.parse([f"--{flag}={name}", "--pairs=20"]), "cpu"), flag)
        assert isinstance(found, dict | str)
        if flag == "name" and isinstance(found, dict):
            folder = (paths.RESULTS / found["SLUG"]).resolve()
            assert folder.parent == paths.RESULTS and folder != paths.RESULTS


def test_a_link_is_read_and_never_quoted_and_a_circle_or_a_folder_is_no_file(tmp_path: Path) -> None:
    secret, place = tmp_path / "secret.txt", tmp_path / "set"
    secret.write_text("word17 word18\n")
    place.mkdir()
    for name in ("pairs.jsonl", "outcome.json", "config.json"):
        call = folders.check_model if name == "config.json" else pairs.load_set
        (place / "pairs.jsonl").write_bytes(GOOD)
        path = place / name
        for target in (secret, path):
            path.unlink(missing_ok=True)
            path.symlink_to(target)
            found = answered(call, str(place))
            assert name in found and "word17" not in found and (target == secret or f"no {name}" in found)
        path.unlink()
        path.mkdir()
        assert f"no {name}" in answered(call, str(place))
        path.rmdir()
    (place / "loop").symlink_to(place / "loop")
    for call in (folders.check_model, check_prompts):
        assert str(place / "loop") in answered(call, str(place / "loop"))
