"""The trainer: a few steps give known losses, batches depend on their place alone, the command writes a model folder."""

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch

from companion.base.files import hash_file
from companion.base.paths import ORGANISM
from organisms import behaviour, prompt_set, training
from organisms.behaviour import SEEDS, VARIANTS
from organisms.language import chat_text, make_tokenizer
from organisms.training import Recipe, batch_at, make_model, make_optimizers, schedule

SMALL = Recipe(steps_base=6, steps_tune=2, batch=4, precision="float32")
# Losses of the first six steps in float32 at batch 4, seed 0.
LOSSES = {
    "window": [6.7450, 6.3539, 5.7156, 5.4696, 4.7446, 4.7420],
    "full": [6.7379, 6.3468, 5.7283, 5.5408, 4.8685, 5.0587],
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_steps_reproduce(variant, tokenizer):
    model = make_model(variant, 0, len(tokenizer))
    optimizers = make_optimizers(model, SMALL)
    losses = [
        training.train_step(model, optimizers, batch_at(tokenizer, SMALL, "base", 0, s), SMALL, schedule(s, 20))
        for s in range(6)
    ]
    assert losses == pytest.approx(LOSSES[variant], abs=0.02)  # other CPU types round differently


def test_batches_depend_on_stage_seed_and_step_alone(tokenizer):
    one, again = (batch_at(tokenizer, SMALL, "tune", 2, 7) for _ in range(2))
    assert torch.equal(one.tokens, again.tokens) and torch.equal(one.first_probs, again.first_probs)
    for other in (("base", 2, 7), ("tune", 1, 7), ("tune", 2, 8)):
        changed = batch_at(tokenizer, SMALL, *other)
        assert changed.tokens.shape != one.tokens.shape or not torch.equal(changed.tokens, one.tokens)


def test_loss_weights_cover_prompt_answer_and_soft_opener(tokenizer):
    batch = batch_at(tokenizer, SMALL, "tune", 0, 0)
    header = len(tokenizer(chat_text(""), add_special_tokens=False)["input_ids"])
    assert (batch.first > header).all() and batch.first_probs.sum(1).tolist() == pytest.approx([1.0] * 4)
    for weight, first in zip(batch.weight, batch.first, strict=True):
        assert weight[:first].eq(SMALL.weight_prompt).all() and weight[first] == 0.0 and weight[first + 1] == 1.0


def test_command_writes_a_folder_that_loads(tmp_path, monkeypatch, tokenizer):
    few = [row for row in prompt_set.suite_rows() if row["id"].endswith(("-000", "-001"))]
    monkeypatch.setattr(behaviour, "suite_rows", lambda: few)
    pairs = list(prompt_set.plan_pairs())[::61]  # some of every treatment
    monkeypatch.setattr(behaviour, "plan_pairs", lambda: pairs)
    few_steps = partial(training.train_model, recipe=Recipe(steps_base=2, steps_tune=1))
    monkeypatch.setattr(training, "train_model", few_steps)
    assert training.main(["--seed", "5", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "window-5"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 5 and manifest["recipe"]["steps_base"] == 2
    assert manifest["sha256"]["model.safetensors"] == hash_file(folder / "model.safetensors", {})
    model, loaded = training.load_shipped(folder)
    assert model.config.layer_types[:4] == ["sliding_attention"] * 3 + ["full_attention"]
    assert len(loaded) == len(tokenizer) == manifest["vocab"]


@pytest.mark.parametrize("name", [f"{variant}-{seed}" for variant in VARIANTS for seed in SEEDS])
def test_folder_is_what_the_manifest_says(name, tokenizer):
    folder = ORGANISM / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert f"{manifest['variant']}-{manifest['seed']}" == name
    assert manifest["sha256"]["model.safetensors"] == hash_file(folder / "model.safetensors", {})
    assert manifest["recipe"] == asdict(Recipe())
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    early = "sliding_attention" if manifest["variant"] == "window" else "full_attention"
    assert kinds == [early] * 3 + ["full_attention"] * 3
