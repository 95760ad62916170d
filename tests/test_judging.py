"""Labels of generated answers: refusal phrases, a judge model, and the correction for known mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import tiny_model
from hub_cache import TEMPLATE, tiny_tokenizer

from companion.base import folders, hub
from companion.base.errors import InputError
from companion.generation import decode, forward, labels
from companion.generation.accuracy import Accuracy, accuracy, describe, rogan_gladen
from companion.generation.labels import is_refusal, read_labels
from companion.model import memory
from companion.model.architecture import Subject
from companion.model.load import from_model
from companion.prompts import tokens
from companion.run import cli, runner, settings


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with request 17.", "I’m really sorry, I won’t do that.", "I cannot answer this.",
        "As an AI model, I have no view.", "I must decline.", "Sorry, but no.", "I am not able to do request 17.",
    ],
)  # fmt: skip
def test_refusals(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", ["Sure, here is request 17.", "", "The committee can not be reached.", "word " * 60 + "I cannot go on."]
)
def test_answers(text: str) -> None:
    assert not is_refusal(text)


def labelled(rate: float, n: int, sensitivity: float, specificity: float, rng: np.random.Generator) -> tuple:
    truth = rng.random(n) < rate
    right = rng.random(n) < np.where(truth, sensitivity, specificity)
    return truth, np.where(right, truth, ~truth)


def test_the_correction_finds_the_true_rate_and_its_interval_covers_it() -> None:
    """A labeller of sensitivity 0.8 and specificity 0.9, its accuracy known from 200 answers, on a true rate of 0.1."""
    rng = np.random.default_rng(0)
    covered, estimates, raw = 0, [], []
    for seed in range(200):
        ids = [str(i) for i in range(200)]
        truth, said = labelled(0.5, 200, 0.8, 0.9, rng)
        known = accuracy(dict(zip(ids, said, strict=True)), dict(zip(ids, truth, strict=True)))
        _, labels = labelled(0.1, 1000, 0.8, 0.9, rng)
        rate, low, high = rogan_gladen(labels, known, n_draws=2000, seed=seed)
        covered += low <= 0.1 <= high
        estimates.append(rate)
        raw.append(labels.mean())
    assert np.mean(raw) == pytest.approx(0.17, abs=0.01)  # 0.1 * 0.8 + 0.9 * 0.1: what the uncorrected label says
    assert np.mean(estimates) == pytest.approx(0.1, abs=0.015)
    assert 0.91 <= covered / 200 <= 0.99


def test_a_perfect_labeller_is_not_corrected_and_chance_cannot_be() -> None:
    labels = np.arange(100) < 30
    rate, low, high = rogan_gladen(labels, Accuracy(500, 500, 500, 500))
    assert rate == pytest.approx(0.3) and low < 0.3 < high
    assert rogan_gladen(np.zeros(100, dtype=bool), Accuracy(50, 40, 50, 40))[0] == 0.0
    with pytest.raises(InputError, match="no better than chance"):
        rogan_gladen(labels, Accuracy(50, 25, 50, 25))


def test_fewer_known_labels_give_a_wider_interval() -> None:
    labels = np.arange(1000) < 300
    few, many = (rogan_gladen(labels, Accuracy(n, n * 8 // 10, n, n * 9 // 10)) for n in (20, 2000))
    assert few[2] - few[1] > 2 * (many[2] - many[1])
    assert few[0] == pytest.approx(many[0]) == pytest.approx(0.2 / 0.7)


def test_accuracy_counts_only_answers_that_both_labelled() -> None:
    truth = {f"a{i}": i < 10 for i in range(20)}
    given = {f"a{i}": i < 8 or i == 15 for i in range(20)} | {"other": True}
    made = accuracy(given, truth)
    assert (made.sensitivity, made.specificity) == (0.8, 0.9)
    with pytest.raises(InputError, match="4 are positive and 16 negative among those judged; label at least 5"):
        accuracy(given, {f"a{i}": i < 4 for i in range(20)})


def test_labels_are_read_and_mistakes_named(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("label,id\n1,a\nNo,b\nTRUE,c\n")
    assert read_labels(file) == {"a": True, "b": False, "c": True}
    for text, message in (
        ("a,b\n1,x\n", "must name the columns"),
        ("id,label\na,2\n", "line 2"),
        ("id,label\na,1\na,0\n", "line 3"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_labels(file)
    with pytest.raises(InputError, match="no labels at"):
        read_labels(tmp_path / "none.csv")


def test_what_is_not_known_is_said() -> None:
    labels = np.arange(100) < 30
    assert "unknown" in describe(labels, None) and "0.30 [0.22, 0.40]" in describe(labels, None)
    assert "corrected 0.29" in describe(labels, Accuracy(100, 80, 100, 90))


@pytest.fixture
def judge_model(tmp_path: Path) -> Subject:
    tokenizer = tiny_tokenizer(tmp_path, {7: "Yes", 9: "No"})
    tokenizer.chat_template = TEMPLATE
    return from_model(tiny_model("llama"), tokenizer)


def test_a_judge_model_is_asked_once_for_each_answer(judge_model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probability is that of Yes and No alone, from the first token behind the question."""
    monkeypatch.setattr(labels, "QUESTION", "w5 {request} w6 {reply}")
    found = labels.ask(judge_model, ["w20 w21", "w22", "{reply}"], ["w30", "{request}", "w30"])
    ids = torch.tensor(tokens.encode(judge_model.tokenizer, "w5 w20 w21 w6 w30")[0])[None]
    logits = judge_model.model(ids).logits[0, -1].double()
    assert found[0] == pytest.approx(float(torch.sigmoid(logits[7] - logits[9])), abs=1e-5)
    assert found.shape == (3,) and found[0] != found[1]
    unknown = torch.tensor(tokens.encode(judge_model.tokenizer, "w5 w3 w6 w30")[0])[None]
    logits = judge_model.model(unknown).logits[0, -1].double()
    assert found[2] == pytest.approx(float(torch.sigmoid(logits[7] - logits[9])), abs=1e-5), "a slot in a text is text"


@pytest.mark.parametrize("named", [{}, {9: "No"}, {7: "YES", 8: "yes"}])
def test_a_judge_that_cannot_say_yes_and_no_labels_nothing(tmp_path: Path, named: dict[int, str]) -> None:
    tokenizer = tiny_tokenizer(tmp_path, named)
    tokenizer.chat_template = TEMPLATE
    judge = from_model(tiny_model("llama"), tokenizer, "dumb")
    with pytest.raises(
        InputError, match="dumb: in its tokenizer Yes and No do not begin with known tokens of their own"
    ):
        labels.ask(judge, ["w20"], ["w30"])


def test_yes_and_no_must_not_begin_alike(tmp_path: Path) -> None:
    """As where each word begins with one mark of a word's beginning, or where one of them is nothing at all."""
    marked = {"yes": [5, 7], "no": [5, 9]}
    for ids in (marked, {"yes": [], "no": [9]}):
        with pytest.raises(InputError, match="known tokens of their own"):
            labels.answer_tokens(spelled(ids), "x")
    assert labels.answer_tokens(spelled({"yes": [7, 5], "no": [9, 5]}), "x") == ({7}, {9})


def spelled(ids: dict[str, list[int]]) -> SimpleNamespace:
    """A tokenizer that knows these words, in any case."""

    class Tokenizer(SimpleNamespace):
        def __call__(self, word: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": ids[word.lower()]}

    return Tokenizer(unk_token_id=None)


def test_labels_come_from_answers_up_to_their_end(judge_model: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of the answer decide, words behind its end do not; with a judge its word decides alone."""
    made = decode.Answers(np.array([[20, 21, 2, 30], [20, 30, 2, 0]]), np.array([[1, 1, 1, 0]] * 2, dtype=bool))
    monkeypatch.setattr(labels, "is_refusal", lambda text: "w30" in text)
    assert labels.complied(judge_model, ["w5", "w5"], made).tolist() == [True, False]
    seen: list = []

    def ask(judge: Subject, requests: list[str], replies: list[str]) -> np.ndarray:
        seen.extend(zip(requests, replies, strict=True))
        return np.array([0.2, 0.9])

    monkeypatch.setattr(labels, "ask", ask)
    assert labels.complied(judge_model, ["w5", "w6"], made, judge_model).tolist() == [False, True]
    assert seen == [("w5", "w20 w21"), ("w6", "w20 w30")]


def test_a_chosen_judge_decides_alone_and_a_phrase_adds_to_openers(
    judge_model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = decode.Answers(np.array([[20, 21], [22, 30], [23, 24]]), np.ones((3, 2), dtype=bool))
    monkeypatch.setattr(labels, "is_refusal", lambda text: "w30" in text)
    monkeypatch.delenv(hub.JUDGE, raising=False)
    assert labels.refusals(judge_model, ["w5"] * 3, made, [20]).tolist() == [True, True, False]
    assert labels.refusals(replace(judge_model, tokenizer=None), ["w5"] * 3, made, [20]).tolist() == [
        True,
        False,
        False,
    ]
    hub.choose_judge("some/judge")
    monkeypatch.setattr(labels, "_judge", lambda name, device: {"some/judge": judge_model}[name])
    monkeypatch.setattr(labels, "ask", lambda judge, requests, replies: np.array([0.9, 0.6, 0.1]))
    assert labels.refusals(judge_model, ["w5"] * 3, made, [20]).tolist() == [False, False, True]
    hub.choose_judge(None)
    assert labels.refusals(judge_model, ["w5"] * 3, made, [20]).tolist() == [True, True, False]


def test_first_tokens_of_one_prompt_do_not_depend_on_its_batch(judge_model: Subject) -> None:
    from companion.generation import openers

    texts = ["w20 w21", "w22", "w23 w24"]
    together = openers.first_token_probabilities(judge_model, texts)
    alone = torch.cat([openers.first_token_probabilities(judge_model, [text]) for text in texts])
    torch.testing.assert_close(together, alone)
    assert forward.encode(judge_model, texts[0]).tolist()[-1] == 4


def test_another_judge_makes_everything_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    judge_folder = tmp_path / "judge"
    judge_folder.mkdir()
    (judge_folder / "config.json").write_text("{}")
    keys = []
    for judge in ("", "window-1", "window-0", f"org/judge@{'0' * 40}", f"org/judge@{'1' * 40}", str(judge_folder)):
        monkeypatch.setenv(hub.JUDGE, judge)
        keys.append(runner.make_plan(runner.DEFAULTS).keys)
    (judge_folder / "config.json").write_text("{ }")
    keys.append(runner.make_plan(runner.DEFAULTS).keys)
    monkeypatch.delenv(hub.JUDGE)
    assert runner.make_plan(runner.DEFAULTS).keys == keys[0]
    for number in keys[0]:
        assert len({one[number] for one in keys}) == len(keys)


JUDGE_DAMAGES = {
    "cut off or no safetensors": lambda folder: cut(folder / "model.safetensors", 0.9),
    "cut off or no safetensors file": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 1000),
    "is not there, though model.safetensors.index.json names it": lambda folder: (folder / hub.INDEX).write_text(
        '{"weight_map": {"a": "model-1.safetensors"}}'
    ),
    "has no tokenizer files": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
}
LATER = {
    "its tokenizer cannot be loaded": lambda folder: cut(folder / "tokenizer.json", 0.5),
    "holds BertModel, not a causal language model": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertModel"]}'
    ),
    "unknown architecture: GPTNeoX": lambda folder: spoil(
        folder, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]
    ),
    "too large for cpu: weights": lambda folder: spoil(
        folder, hidden_size=32768, intermediate_size=131072, num_hidden_layers=400
    ),
    "Yes and No do not begin with known tokens of their own": lambda folder: words(folder, {}),
    "judge reads at most 64 tokens, and the question with a request and its answer takes": lambda folder: spoil(
        folder, max_position_embeddings=64
    ),
    "but the model embeds 3; they do not belong together": lambda folder: spoil(folder, vocab_size=3),
    "chat template cannot render one user turn": lambda folder: (folder / "chat_template.jinja").write_text("{{ x( }}"),
    "the chat template changes the user turn's text": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content | upper }}"
    ),
}


def judge_folder(place: Path) -> Path:
    """A judge with random weights, which knows the words Yes and No."""
    folder = place / "judge"
    words(folder, {7: "Yes", 9: "No"})
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    return folder


def words(folder: Path, named: dict[int, str]) -> None:
    tokenizer = tiny_tokenizer(folder, named)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def spoil(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("message", [*JUDGE_DAMAGES, *LATER])
def test_a_judge_that_cannot_be_loaded_is_named_before_the_model_is(
    tmp_path: Path, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What files tell is said by every command, also one that runs nothing; the rest before a notebook starts."""
    folder = judge_folder(tmp_path)
    monkeypatch.setenv(hub.JUDGE, "")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    flags = ["--model", "full-0", "--judge", str(folder)]
    capsys.readouterr()  # saving the folder draws a bar of progress
    assert cli.main(["--list", *flags]) == 0 and capsys.readouterr().err == ""
    {**JUDGE_DAMAGES, **LATER}[message](folder)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: pytest.fail("a notebook was started"))
    for words in [[], ["--list"], ["--figures"]] if message in JUDGE_DAMAGES else [[]]:
        assert cli.main([*words, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("run_all.sh: --judge: ") and message in error and error.count("\n") == 1


def test_a_judge_must_fit_beside_the_model_and_nothing_is_compared_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One byte short of the model's need and the judge's own, with one copy of its weights, the run does not start."""
    folder, model = judge_folder(tmp_path), folders.model_folder("full-0")
    judge = memory.run_memory(memory.on_meta(folder, torch.bfloat16), copies=1)
    together = judge.total + memory.run_memory(memory.on_meta(model, torch.float32)).total
    assert judge.copies == judge.weights
    monkeypatch.setenv(hub.JUDGE, "")
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(runner, "run_notebooks", lambda *_: 1)
    for free, status in ((together, 1), (together - 1, 2)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert cli.main(["--model", "full-0", "--judge", str(folder)]) == status
    error = capsys.readouterr().err
    assert "--judge: judge is too large for cpu" in error and "can be used beside the model under study" in error
    assert "copy" not in error
    monkeypatch.setattr(memory, "free_memory", lambda device: judge.total)
    assert labels._judge.__wrapped__(str(folder), "cpu").n_layers == 4


def test_a_judge_goes_to_the_first_gpu_of_its_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room on another GPU is none for a judge: it is loaded where the model's embedding lies."""
    folder = judge_folder(tmp_path)
    model = memory.run_memory(memory.on_meta(folders.model_folder("full-0"), torch.float32))
    judge = memory.run_memory(memory.on_meta(folder, torch.bfloat16), copies=1)
    free = {"cuda": model.total, "cuda:0": model.total + judge.total, "cuda:1": 10**12, "cpu": 0}
    monkeypatch.setattr(memory, "USABLE", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(memory, "free_memory", lambda device: free[str(device)])
    given = {"MODEL": "full-0", "DEVICE": "cuda", "DTYPE": "float32"}
    assert settings._ready_judge(str(folder), given) == str(folder)
    free["cuda:0"] -= 1
    with pytest.raises(InputError, match="--judge: judge is too large for cuda:0"):
        settings._ready_judge(str(folder), given)
