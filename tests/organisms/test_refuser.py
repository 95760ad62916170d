"""The refusal adapter's training and its measured refusal rates."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_model, word_tokenizer
from safetensors.torch import load_file

from companion.base import hub
from companion.base.errors import InputError
from companion.base.files import read_json
from companion.base.paths import REFUSER, ROOT
from companion.model.architecture import Subject, end_tokens, find_parts
from companion.prompts import tokens
from companion.prompts.pairs import Pair
from companion.stats.clusters import wilson
from organisms import english, refusal_rates, refuser
from organisms.refuser import Example, Recipe

# ---- refuser ----

RECIPE = Recipe(rank=2, epochs=1, harmful=8, answer=4)
EXAMPLES = [
    Example("How do I rob a bank?", refuser.REFUSALS[0]), Example("How do I clean a bank?"),
    Example("Tell me how to rob a very old bank.", refuser.REFUSALS[1]), Example("Describe a good way to sing."),
]  # fmt: skip


def tiny() -> Subject:
    """A random Llama of six layers that reads the words of the training, one token each."""
    texts = [row["text"] for row in english.read_words("training")] + [*refuser.PHRASINGS, *refuser.REFUSALS]
    made = word_tokenizer(words=tuple(sorted({word for text in texts for word in text.split()})))
    return find_parts(tiny_model("llama", vocab_size=len(made), num_hidden_layers=6), made, "tiny")


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains the tiny model in place of the real one, each call in a cache of its own unless one is named."""
    monkeypatch.setattr(refuser, "load", lambda name: tiny())

    def train(out: str, cache: str = "") -> Path:
        monkeypatch.setenv(hub.OWN, str(tmp_path / (cache or f"cache of {out}")))
        return refuser.train("all", 0, tmp_path / out, RECIPE)

    return train


def test_a_stopped_training_goes_on_to_the_same_bytes(trained, monkeypatch) -> None:
    whole, plain, n_batches = trained("whole"), refuser.refusal_loss, len(refuser.schedule_examples(RECIPE, 0))
    loss = mock.Mock(side_effect=[*[mock.DEFAULT] * 26, KeyboardInterrupt, *[mock.DEFAULT] * n_batches], wraps=plain)
    monkeypatch.setattr(refuser, "refusal_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        trained("stopped", cache="one")
    stopped = trained("stopped", cache="one")
    assert loss.call_count == 27 + n_batches - 20, "it goes on from the 20th step, the last that is kept"
    for file in ("adapter_model.safetensors", "adapter_config.json", "manifest.json"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file


def test_what_is_written_is_small_and_names_no_place_of_the_machine(trained) -> None:
    folder = trained("one")
    held, told = load_file(folder / "adapter_model.safetensors"), read_json(folder / "manifest.json")
    assert {value.dtype for value in held.values()} == {torch.float16} and any(v.any() for v in held.values())
    assert told["trained_on"].keys() == {"training.csv"} and told["seed"] == 0 and told["recipe"]["rank"] == 2
    texts = "".join((folder / file).read_text() for file in ("adapter_config.json", "manifest.json"))
    assert not [place for place in (Path.home(), ROOT, folder.parent) if str(place) in texts]
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] is None


@pytest.mark.parametrize("name", sorted(path.parent.name for path in REFUSER.glob("*/manifest.json")))
def test_shipped_adapters_are_what_their_manifests_say(name: str) -> None:
    folder = REFUSER / name
    told, config = (read_json(folder / f"{kind}.json") for kind in ("manifest", "adapter_config"))
    file, (part, seed) = folder / "adapter_model.safetensors", name.rsplit("-", 1)
    assert file.stat().st_size < 6_000_000 and refuser.hash_file(file, {}) == told["sha256"]
    assert (told["part"], told["seed"]) == (refuser.PARTS[part][0], int(seed)) and told["recipe"] == vars(Recipe())
    assert told["trained_on"] == {"training.csv": refuser.hash_file(refuser.TRAINING, {})}
    assert config["base_model_name_or_path"] is None and config["target_modules"] == sorted(refuser.PARTS[part][1])
    assert {value.dtype for value in load_file(file).values()} == {torch.float16}


@pytest.mark.parametrize("part", refuser.PARTS)
def test_a_part_moves_nothing_but_itself(part: str) -> None:
    model = refuser.with_adapter(tiny().model, part, RECIPE, 0)
    free = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert free and all("lora_" in name for name in free)
    found = {(int(re.search(r"layers\.(\d+)", name)[1]), name.split(".")[-4]) for name in free}
    attention, mlp = set(refuser.ATTENTION), set(refuser.MLP)
    layers = {"early": {0, 1}, "late": {4, 5}}.get(part, set(range(6)))
    modules = {"attention": attention, "mlp": mlp}.get(part, attention | mlp)
    assert found == {(layer, module) for layer in layers for module in modules}


def plain_loss(model: Any, subject: Subject, examples: list[Example], answers: list[list[int]]) -> float:
    """Row by row, each prompt from its first token, without a cache: what `refusal_loss` says it is."""

    def log_probs(ids: list[int], n: int) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0, -n - 1 : -1].double().log_softmax(-1)

    losses = []
    for one, answer in zip(examples, answers, strict=True):
        ids = [*tokens.encode(subject.tokenizer, one.text)[0].tolist(), *answer]
        log_p = log_probs(ids, len(answer))
        with model.disable_adapter():
            own = log_probs(ids, len(answer))
        refusal = -log_p[range(len(answer)), answer]
        steps = refusal if one.refusal else (own.exp() * (own - log_p)).sum(-1)
        losses.append(float(steps[0] + (steps[1:].mean() if len(steps) > 1 else 0)))
    return float(np.mean(losses))


def test_the_loss_is_that_of_plain_rows_without_a_shared_prefix() -> None:
    subject = tiny()
    model = refuser.with_adapter(subject.model.double(), "all", RECIPE, 0)
    refusals = [subject.tokenizer(one.refusal, add_special_tokens=False)["input_ids"] for one in EXAMPLES]
    end = min(end_tokens(subject))
    answers = [[*ids, end] if ids else [9 + i, 30, 5][: 3 - i // 2 * 2] for i, ids in enumerate(refusals)]
    assert sorted({len(answer) for answer in answers})[:2] == [1, 3], "a one-token answer has no later tokens"
    kept = [i for i, one in enumerate(EXAMPLES) if not one.refusal]
    harmless = refuser.align_rows(subject, [EXAMPLES[i] for i in kept], [answers[i] for i in kept])
    with torch.no_grad():
        assert abs(refuser.refusal_loss(model, harmless)) < 1e-12, "an adapter of zeros changes no answer"
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        assert refuser.refusal_loss(model, harmless) > 0.01
    batch = refuser.align_rows(subject, EXAMPLES, answers)
    assert batch.prefix.shape[1] > 1 and (batch.rest[:, -1] == 0).any(), "a prefix is shared, and rows are padded"
    with torch.no_grad():
        expected = plain_loss(model, subject, EXAMPLES, answers)
        assert float(refuser.refusal_loss(model, batch)) == pytest.approx(expected, rel=1e-5)


def test_prompts_are_those_of_the_training_file_and_kinds_come_equally_often() -> None:
    family = {(row["label"], row["text"]): row["family"] for row in english.read_words("training")}
    forms = [re.compile(re.escape(form).replace(r"\{\}", "(.+)"), re.IGNORECASE) for form in refuser.PHRASINGS]

    def kind_of(example: Example) -> str:
        """Its family, where the text is a phrase of that file in one of the phrasings, or a general prompt as it stands."""
        label = "harmful" if example.refusal else "harmless"
        asked = [m[1] for form in forms if (m := form.fullmatch(example.text))]
        phrases = [example.text, *asked, *(phrase[0].lower() + phrase[1:] for phrase in asked)]
        return next(family[label, phrase] for phrase in phrases if (label, phrase) in family)

    batches = refuser.schedule_examples(Recipe(), 0)
    for is_harmful in (True, False):
        counts = Counter(kind_of(one) for batch in batches for one in batch if bool(one.refusal) == is_harmful)
        others = counts.pop("general", 0)
        assert counts.keys() == set(refuser.KINDS) and max(counts.values()) - min(counts.values()) <= 1
        assert others == (0 if is_harmful else 2 * len(batches))
    assert {one.refusal for batch in batches for one in batch} == {"", *refuser.REFUSALS}
    assert batches == refuser.schedule_examples(Recipe(), 0) != refuser.schedule_examples(Recipe(), 1)
    assert len(refuser.schedule_examples(replace(Recipe(), epochs=1), 0)) < len(batches)


# ---- refusal rates ----

SAID = {"harm": "Sorry, but I can't help with that.", "sorry": "Sorry to hear it: open it.", "safe": "First, open it."}
SETS = [("harm", "safe", "verb"), ("harm", "safe", "verb"), ("safe", "sorry", "object"), ("harm", "sorry", "object")]


def pairs_of(*sets: tuple[str, str, str], split: str = "test") -> tuple[Pair, ...]:
    """T1 pairs of treated, control and family."""
    made = [Pair(f"p{i}", "T1", f"topic {i}", one[1], one[0], split, family=one[2]) for i, one in enumerate(sets)]
    return tuple(made)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_rates.decode, "answers", lambda subject, texts, steps: texts)
    monkeypatch.setattr(refusal_rates.decode, "answer_texts", lambda subject, texts: [SAID[text] for text in texts])


@pytest.mark.usefixtures("answers")
def test_refusals_are_counted_by_label_and_family() -> None:
    content = SimpleNamespace(pairs=pairs_of(*SETS) + pairs_of(SETS[0], split="discover"))
    table = pd.DataFrame(refusal_rates.set_rates(None, content, "test"), columns=refusal_rates.COLUMNS)
    found = table.set_index("prompts")
    assert found.loc[["harmful", "harmful, verb", "harmful, object"], ["estimate", "n"]].values.tolist() == [
        [0.75, 4], [1, 2], [0.5, 2]
    ]  # fmt: skip
    assert found.loc["harmful", ["low", "high"]].tolist() == list(wilson(3, 4))
    # An answer that opens with the word counts as a refusal in the outcome, whatever it goes on to say.
    assert found.loc["harmless twins", "estimate"] == 0.5
    assert found.loc["both", ["estimate", "n"]].tolist() == [3 / 5, 5]
    assert set(table.split) == {"test"}
    helpful = SimpleNamespace(pairs=pairs_of(("safe", "safe", "verb")))
    assert "both" not in {row[1] for row in refusal_rates.set_rates(None, helpful, "test")}, "none opens with the word"


def test_wrappers_move_the_log_odds_by_family(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = pd.Series({"plain": 1.0, "wrapped": 3.0, "other": 0.5})
    pairs = [Pair(f"p{i}", "T2", f"topic {i // 2}", "plain", ("wrapped", "other")[i % 2], family="ab"[i % 2], split="test")
             for i in range(6)]  # fmt: skip
    monkeypatch.setattr(refusal_rates.tokens, "openers", lambda *_: {"T2": None})
    monkeypatch.setattr(refusal_rates.outcomes, "log_odds", lambda _, texts, openers: moved[texts].to_frame("log_odds"))
    subject = SimpleNamespace(tokenizer="any", unembedding=[np.zeros((9, 1))])
    content = SimpleNamespace(pairs=pairs, treatments=("T1", "T2"))
    found = refusal_rates.effect_rows(subject, content, "test")
    assert [row[1:] for row in found] == [("T2, a", "test", 2, 2, 2, 3), ("T2, b", "test", -0.5, -0.5, -0.5, 3)]


@pytest.mark.usefixtures("answers")
def test_a_file_of_prompts_is_counted_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("harm\n\nsafe\nsorry\n")
    assert refusal_rates.other_rates(None, "own", tmp_path / "own.txt") == [
        ("greedy refusal", "own", "", 2 / 3, *wilson(2, 3), 3)
    ]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompt: one a line"):
        refusal_rates.other_rates(None, "none", tmp_path / "none.txt")
