"""Folders that are no sound model: one clear sentence from the check before a run or from loading, never a traceback."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from companion.base import folders
from companion.base.errors import InputError
from companion.base.paths import ORGANISM, PROMPTS
from companion.mediation.study import begin
from companion.model import load
from companion.prompts import tokens
from companion.prompts.pairs import load_set
from companion.run.settings import check_pairs

MODEL = ORGANISM / "window-0"


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def torn_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pickle_under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def other_shape(folder: Path) -> None:
    changed(folder, hidden_size=64)


def more_layers(folder: Path) -> None:
    changed(folder, num_hidden_layers=99)


def unknown_family(folder: Path) -> None:
    changed(folder, model_type="no-such-family")


def small_vocabulary(folder: Path) -> None:
    """Weights for fewer tokens than the tokenizer has."""
    tensors = load_file(folder / "model.safetensors")
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    cut = {name: (value[:10].clone() if value.shape[:1] == (n,) else value) for name, value in tensors.items()}
    save_file(cut, folder / "model.safetensors", metadata={"format": "pt"})
    changed(folder, vocab_size=10)


def short_context(folder: Path) -> None:
    """Fewer positions than a prompt with its answer takes; a learned table of them would end in an index error."""
    changed(folder, max_position_embeddings=30)


def dangling_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder.parent / "nowhere.safetensors")


def changed(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def broken_template(folder: Path) -> None:
    _template(folder, "{% for m in messages %}{{ m.content }")


def template_that_refuses(folder: Path) -> None:
    _template(folder, "{{ raise_exception('only tools may speak') }}")


def _template(folder: Path, text: str) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(text)


BROKEN: dict[Callable[[Path], None], str] = {
    missing_tensor: "lacks 1 tensors",
    torn_weights: "could not be loaded",
    pickled_weights: "its weights are pickled",
    pickle_under_another_name: "could not be loaded",
    other_shape: "lacks|could not be loaded",
    more_layers: "lacks|could not be loaded",
    unknown_family: "could not be loaded",
    small_vocabulary: "token",
    short_context: "reads at most 30 tokens, and a prompt with its answer takes up to",
    dangling_link: "could not be loaded",
    broken_template: "chat template cannot render one user turn .*Error",
    template_that_refuses: "chat template cannot render one user turn .*only tools may speak",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    damage(folder)
    with pytest.raises(InputError, match=BROKEN[damage]):
        folders.check_model(str(folder))
        begin(str(folder), "embedded", "x", pairs=10)


def test_pairs_are_checked_as_the_profile_takes_them(tmp_path: Path) -> None:
    """The smoke profile takes the first of each kind, which may be unusable where later ones are not."""
    topics = [pair for pair in load_set("embedded").pairs if pair.treatment == "T1"][:60]
    rows = [
        {"id": pair.id, "treatment": "T1", "topic": pair.topic, "control": pair.control, "treated": pair.treated}
        for pair in topics
    ]
    for row in rows[:50]:
        row["treated"] += " please"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy2(PROMPTS / "embedded" / "outcome.json", tmp_path)
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    (tmp_path / "outcome.json").write_text(json.dumps(outcome.get("T1", outcome)))
    assert check_pairs("embedded", str(tmp_path), 0, "full")[0].startswith("10 of 60 pairs usable")
    with pytest.raises(InputError, match="usable"):
        check_pairs("embedded", str(tmp_path), 0, "smoke")


def test_links_to_weights_elsewhere_are_followed(tmp_path: Path) -> None:
    """Download caches consist of links; what they lead to is what is hashed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in MODEL.iterdir():
        (folder / path.name).symlink_to(path)
    folders.check_model(str(folder))
    assert load.load(folder).sha256 == load.load(MODEL).sha256


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1),
    name=st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]),
    cut=st.booleans(),
)
def test_damage_anywhere(tmp_path: Path, place: float, name: str, cut: bool) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in MODEL.iterdir():
        os.link(path, folder / path.name) if path.name != name else shutil.copy2(path, folder)
    data = (folder / name).read_bytes()
    at = int(place * (len(data) - 1))
    (folder / name).write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    try:
        folders.check_model(str(folder))
        one = load.load(folder)
        assert one.tokenizer is not None
        tokens.tokenize(load_set("embedded").pairs[:20], one.tokenizer)
    except InputError as error:
        assert len(str(error)) > 15
