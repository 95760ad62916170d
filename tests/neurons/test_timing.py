"""Timed clamps against plain runs of the model, and the two labels of an answer: by its opener, and by its content."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import GATE_NEURON, Program, compiled, cue_pairs

from companion.base.hub import JUDGE
from companion.generation import labels
from companion.generation.decode import greedy_answers
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.neurons import timing
from companion.neurons.timing import Clamp
from companion.prompts.tokens import Openers

STEPS = 4


@pytest.fixture(scope="module")
def this() -> Study:
    """A compiled model whose gate neuron is moved to the last layer, where clamps act; its answers are "yes" or "no"."""
    subject = compiled(Program(gain=3.0))
    tokenizer, model = subject.tokenizer, subject.model.model
    assert tokenizer is not None
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            source, target = (getattr(model.layers[layer].mlp, name).weight for layer in (2, 3))
            target.copy_(source)
            source.zero_()
        # Without a signal the model says "no", with it "yes": 3/20 * 10 = 1.5 on each side of the bias.
        no = tokenizer.convert_tokens_to_ids("no")
        subject.model.lm_head.weight[no, 0] = 0.7 / 1000
    pairs = cue_pairs(tokenizer, "off low", "on low", n=4)
    yes, no = ((tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no"))
    return Study("compiled", subject, tuple(pairs), {"T2": Openers(yes, no)}, {}, {})


Judge = Callable[[str, str], str] | None
GATE = Clamp("neurons", (GATE_NEURON,))


def test_closing_the_gate_at_the_first_token_turns_every_answer_into_a_refusal(this: Study) -> None:
    (made,) = timing.clamped_answers(this, [this.pairs], [(GATE, name) for name in timing.SCHEDULES], STEPS)
    labels = made.pivot(index="pair_id", columns="schedule", values="label")
    assert (labels["none"] == "harmful").all()
    assert (labels[["prompt", "first token", "first five", "all tokens"]] == "refusal").all().all()
    assert (labels["all but the first"] == "harmful").all()


AT = {
    "none": [], "prompt": [0], "first token": [0], "first five": [0, 1, 2, 3, 4], "all tokens": [0, 1, 2, 3, 4, 5],
    "all but the first": [1, 2, 3, 4, 5],
}  # fmt: skip


@pytest.mark.parametrize("schedule", timing.SCHEDULES)
def test_each_schedule_acts_at_its_own_steps_with_its_own_values(this: Study, schedule: str) -> None:
    """The gate neuron's input to the down projection, as the model reads it, call by call."""
    subject, prompt = this.subject, torch.tensor(this.pairs[0].treated[None])
    n_pos = prompt.shape[1]
    other = timing.ControlValues(
        100 + torch.arange(n_pos, dtype=torch.float32).view(1, -1, 1), torch.full((1, 1, 1), 77.0)
    )
    seen: list[torch.Tensor] = []
    with torch.no_grad(), timing.clamped(subject, [(GATE, schedule)], {GATE: other}):
        look = subject.layers[-1].down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        cache = subject.model(prompt, use_cache=True).past_key_values
        for _ in range(5):
            cache = subject.model(prompt[:, :1], past_key_values=cache, use_cache=True).past_key_values
        look.remove()
    for step, inputs in enumerate(seen):
        expected = 77.0 if step else 100.0 + n_pos - 1
        assert (float(inputs[0, -1, GATE_NEURON]) == expected) == (step in AT[schedule])
    whole = seen[0][0, :, GATE_NEURON] == other.prompt[0, :, 0]
    assert int(whole.sum()) == {"prompt": n_pos, "none": 0, "all but the first": 0}.get(schedule, 1)


def test_control_values_are_those_of_the_control_run_and_its_answer(this: Study) -> None:
    subject, (prompt, _) = this.subject, estimands.prompt_tokens(this.subject, [this.pairs[0]])
    answer = greedy_answers(subject, prompt, STEPS)
    (own,) = timing.control_values(subject, prompt, answer, [GATE]).values()
    seen: list[torch.Tensor] = []
    look = subject.layers[-1].down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    said = torch.tensor(answer.ids[:, answer.mask[0]])
    with torch.no_grad():
        subject.model(torch.cat([prompt, said], dim=1))
    look.remove()
    inputs, n = seen[0][..., [GATE_NEURON]], prompt.shape[1]
    torch.testing.assert_close(own.prompt, inputs[:, :n], rtol=0, atol=1e-6)
    torch.testing.assert_close(own.answer, inputs[:, n:].mean(1, keepdim=True), rtol=0, atol=1e-6)
    assert abs(float(own.prompt[0, -1, 0])) < 0.01  # the gate is closed where the cue is off


def test_arms_side_by_side_are_the_arms_alone(this: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of every clamp and schedule are the same however many arms share a batch, and the pairs' own."""
    arms = [(clamp, name) for clamp in (GATE, Clamp("whole MLP")) for name in timing.SCHEDULES]
    (together,) = timing.clamped_answers(this, [this.pairs], arms, STEPS)
    monkeypatch.setattr(timing, "rows_at_once", lambda *_: 1)
    keys = ["pair_id", "clamp", "schedule"]
    alone = pd.concat(timing.clamped_answers(this, [[pair]], arms, STEPS)[0] for pair in this.pairs)
    pd.testing.assert_frame_equal(*(t.sort_values(keys, ignore_index=True) for t in (together, alone)))
    assert set(together.label) == {"harmful", "refusal"} and together.changed.any()


def test_forced_scores_are_log_probabilities_and_move_with_the_clamp(this: Study) -> None:
    """Without a clamp Y2 is the plain model's; a clamp of the first token lowers it, and one of all tokens otherwise."""
    known: timing.Controls = {}
    timing.clamped_answers(this, [this.pairs], [(GATE, "all tokens")], known=known)
    found = timing.forced_scores(this, list(this.pairs), GATE, ["none", "first token", "all tokens"], known)
    y = found.pivot(index="pair_id", columns="schedule", values="y")
    prompts = estimands.prompt_tokens(this.subject, [this.pairs[0]])
    texts = outcomes.continuations(this.subject, *prompts, this.openers["T2"])
    plain = 0.0
    for text, mask, sign in ((texts.answer, texts.answer_mask, 1), (texts.refusal, texts.refusal_mask, -1)):
        with torch.no_grad():
            logits = this.subject.model(torch.cat([prompts[1], text[:, :-1]], dim=1)).logits[
                :, prompts[1].shape[1] - 1 :
            ]
        picked = logits.double().log_softmax(-1).gather(-1, text[..., None])[..., 0]
        plain += sign * float((picked * mask).sum())
    assert y.loc[this.pairs[0].pair.id, "none"] == pytest.approx(plain, abs=1e-3)
    assert (y["none"] > y["first token"]).all() and not np.allclose(y["first token"], y["all tokens"])


# ---- labels ----

ARMS = [(Clamp("whole MLP"), "none"), (Clamp("whole MLP"), "all tokens")]


@pytest.fixture(scope="module")
def yes() -> Study:
    """Answers repeat "yes", which is no refusal; nothing reads their content."""
    subject = compiled(Program())
    assert subject.tokenizer is not None
    pairs = cue_pairs(subject.tokenizer, "on low", "on high", n=4)
    yes, no = (subject.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    subject.model.lm_head.weight.data[yes, 0] = 1e-3
    return Study("compiled", subject, tuple(pairs), {"T2": Openers((yes,), (no,))}, {}, {})


def judge(request: str, answer: str) -> str:
    assert answer == "yes yes yes"
    return f"own {request}"


@pytest.mark.parametrize(
    ("own", "model", "is_embedded", "label", "content"),
    [
        (None, "", False, "harmful", ""),
        (judge, "", False, "harmful", "own {request}"),
        (judge, "some/model", False, "refusal", "refusal"),  # a judge model decides both, before the study's own
        (judge, "", True, "exact {request}", "exact {request}"),  # as does the exact judge of the embedded language
    ],
    ids=["nothing reads content", "the study's own judge", "a judge model", "the embedded language"],
)
def test_labels_by_the_opener_and_by_content(
    yes: Study, monkeypatch: pytest.MonkeyPatch, own: Judge, model: str, is_embedded: bool, label: str, content: str
) -> None:
    monkeypatch.setenv(JUDGE, model)
    monkeypatch.setattr(labels, "is_embedded", lambda texts: is_embedded and all(texts))
    monkeypatch.setattr(labels, "judge", lambda request, answer: f"exact {request}")
    if model:
        monkeypatch.setattr(labels, "refusals", lambda subject, texts, *_: [True] * len(texts))
    (found,) = timing.clamped_answers(replace(yes, judge=own), [yes.pairs], ARMS, 3)
    assert len(found) == len(yes.pairs) * len(ARMS)
    for one in found.itertuples():
        request = next(pair.pair.treated for pair in yes.pairs if pair.pair.id == one.pair_id)
        assert (one.label, one.content) == (label.format(request=request), content.format(request=request))


def test_lists_that_are_decoded_together_give_the_tables_of_each(yes: Study) -> None:
    few, more = list(yes.pairs[:1]), [replace(pair) for pair in yes.pairs]  # the same pair stands in both
    together = timing.clamped_answers(yes, [few, more, []], ARMS, 3)
    for pairs, found in zip((few, more), together, strict=False):
        pd.testing.assert_frame_equal(found, timing.clamped_answers(yes, [pairs], ARMS, 3)[0])
    assert together[2].empty
