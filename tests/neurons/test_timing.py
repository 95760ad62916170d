"""Clamps of whole answers, teacher-forced and decoded, against plain hooks; and an answer's labels by opener and content."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from models import GATE_NEURON, Program, compiled, cue_pairs, random_pairs, tiny_subject
from oracles import cue_study, read_neurons, text_log_prob
from torch import Tensor

from companion.base.hub import JUDGE
from companion.generation import labels
from companion.generation.decode import greedy_answers
from companion.mediation import estimands, outcomes
from companion.mediation.study import Study
from companion.model.architecture import Subject
from companion.neurons import timing
from companion.neurons.clamping import NeuronSet
from companion.neurons.timing import Clamp
from companion.prompts.tokens import Openers

STEPS = 4


OPENERS = {"T2": Openers((5, 9), (33,), 0)}
SETS = [NeuronSet("last", 3, (1, 4)), NeuronSet("below", 1, (0, 7))]


def values(subject: Subject, prompt: Tensor, text: Tensor, one: NeuronSet) -> Tensor:
    """A set's values in a run of a prompt and all but the last token of a text, (pair, pos, neuron)."""
    return read_neurons(subject, torch.cat([prompt, text[:, :-1]], dim=1), one.layer)[1][..., list(one.neurons)]


def log_prob(
    subject: Subject, prompt: Tensor, text: Tensor, mask: Tensor, one: NeuronSet, at: slice = slice(0), new: Tensor | float = 0.0
) -> Tensor:  # fmt: skip
    """log p of a text behind a prompt, a set held at `new` at some positions."""

    def edit(inputs: Tensor) -> None:
        inputs[:, at, list(one.neurons)] = new

    logits, _ = read_neurons(subject, torch.cat([prompt, text[:, :-1]], dim=1), one.layer, edit)
    return text_log_prob(logits, text, mask)


@pytest.mark.parametrize("one", SETS, ids=["last", "below"])
@pytest.mark.parametrize(("when", "at"), [("first", slice(8, 9)), ("every", slice(8, None))])
def test_timing_is_that_of_hooked_runs(one: NeuronSet, when: str, at: slice) -> None:
    subject, pairs = tiny_subject("llama"), random_pairs(3, 9, 60)
    got = timing.timing_effects(subject, pairs, OPENERS, SETS)
    prompts = estimands.prompt_tokens(subject, pairs)
    texts = outcomes.continuations(subject, *prompts, [OPENERS["T2"]] * 3, timing.FORCED_STEPS)
    wanted = torch.zeros(3, dtype=torch.float64)
    for (text, mask), sign in zip(texts, (1, -1), strict=True):
        runs = [values(subject, prompt, text, one) for prompt in prompts]
        for base, direction in ((0, 1), (1, -1)):
            clean = log_prob(subject, prompts[base], text, mask, one)
            moved = log_prob(subject, prompts[base], text, mask, one, at, runs[1 - base][:, at])
            wanted += sign * direction * (moved - clean) / 2
    np.testing.assert_allclose(got[got["set"] == one.name][when], wanted.numpy(), atol=1e-4)
    assert abs(wanted).max() > 1e-3


def test_closing_cost_is_that_of_a_hooked_run() -> None:
    subject, pairs, one = tiny_subject("llama"), random_pairs(3, 9, 60), SETS[1]
    closed = timing.closed_values(subject, pairs, SETS)
    control, treated = estimands.prompt_tokens(subject, pairs)
    torch.testing.assert_close(closed[one], values(subject, control, control[:, :1], one)[:, -1], rtol=0, atol=1e-6)
    got = timing.closing_cost(subject, pairs, OPENERS, {each: runs[:2] for each, runs in closed.items()})
    got = got[got["set"] == one.name]
    text, _ = outcomes.continuations(subject, treated, treated, [OPENERS["T2"]] * 3, timing.FORCED_STEPS)
    held = (slice(8, None), closed[one][[0, 1, 0], None])
    wanted = log_prob(subject, treated, *text, one) - log_prob(subject, treated, *text, one, *held)
    np.testing.assert_allclose(got.lost, wanted.numpy(), atol=1e-4)
    assert got.n_tokens.tolist() == text[1].sum(1).tolist() and abs(wanted).max() > 1e-3


@pytest.fixture(scope="module")
def this() -> Study:
    """A compiled model whose gate neuron is moved to the last layer, where clamps act; its answers are "yes" or "no"."""
    study = cue_study(compiled(Program(gain=3.0)), n=4)
    model, (no,) = study.subject.model, study.openers["T2"].refuse
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            source, target = (getattr(model.model.layers[layer].mlp, name).weight for layer in (2, 3))
            target.copy_(source)
            source.zero_()
        # Without a signal the model says "no", with it "yes": 3/20 * 10 = 1.5 on each side of the bias.
        model.lm_head.weight[no, 0] = 0.7 / 1000
    return study


GATE = Clamp("neurons", (GATE_NEURON,))


def test_closing_the_gate_at_the_first_token_turns_every_answer_into_a_refusal(this: Study) -> None:
    (made,) = timing.clamped_answers(this, [this.pairs], [(GATE, name) for name in timing.SCHEDULES], STEPS)
    is_open = made.schedule.isin(["none", "all but the first"])
    assert (made.label == np.where(is_open, "harmful", "refusal")).all()


AT = {"none": [], "first token": [0], "first five": range(5), "all tokens": range(6)}
AT["all but the first"] = range(1, 6)


@pytest.mark.parametrize("schedule", timing.SCHEDULES)
def test_each_schedule_acts_at_its_own_steps_with_its_own_values(this: Study, schedule: str) -> None:
    subject, prompt = this.subject, torch.tensor(this.pairs[0].treated[None])
    n_pos = prompt.shape[1]
    ramp = 100 + torch.arange(n_pos, dtype=torch.float32).view(1, -1, 1)
    other = timing.ControlValues(ramp, torch.full((1, 1, 1), 77.0))
    seen: list[Tensor] = []
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
    assert int(whole.sum()) == {"none": 0, "all but the first": 0}.get(schedule, 1)


def test_control_values_are_those_of_the_control_run_and_its_answer(this: Study) -> None:
    subject, (prompt, _) = this.subject, estimands.prompt_tokens(this.subject, [this.pairs[0]])
    answer = greedy_answers(subject, prompt, STEPS)
    (own,) = timing.control_values(subject, prompt, answer, [GATE]).values()
    said = torch.tensor(answer.ids[:, answer.mask[0]])
    _, inputs = read_neurons(subject, torch.cat([prompt, said], dim=1), 3)
    inputs, n = inputs[..., [GATE_NEURON]], prompt.shape[1]
    torch.testing.assert_close(own.prompt, inputs[:, :n], rtol=0, atol=1e-6)
    torch.testing.assert_close(own.answer, inputs[:, n:].mean(1, keepdim=True), rtol=0, atol=1e-6)
    assert abs(float(own.prompt[0, -1, 0])) < 0.01  # the gate is closed where the cue is off


def test_arms_and_lists_side_by_side_are_those_alone(this: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [(clamp, name) for clamp in (GATE, Clamp("whole MLP")) for name in timing.SCHEDULES]
    lists = [list(this.pairs[:1]), [replace(pair) for pair in this.pairs], []]
    *together, none = timing.clamped_answers(this, lists, arms, STEPS)
    monkeypatch.setattr(timing, "rows_at_once", lambda *_: 1)
    for pairs, found in zip(lists, together, strict=False):
        alone = pd.concat(timing.clamped_answers(this, [[pair]], arms, STEPS)[0] for pair in pairs)
        keys = ["pair_id", "clamp", "schedule"]
        pd.testing.assert_frame_equal(*(t.sort_values(keys, ignore_index=True) for t in (found, alone)))
        assert set(found.label) == {"harmful", "refusal"} and found.changed.any()
    assert none.empty


def test_forced_scores_are_log_probabilities_and_move_with_the_clamp(this: Study) -> None:
    """Without a clamp Y2 is the plain model's; a clamp of the first token lowers it, and one of all tokens otherwise."""
    known: timing.Controls = {}
    timing.clamped_answers(this, [this.pairs], [(GATE, "all tokens")], known=known)
    found = timing.forced_scores(this, list(this.pairs), GATE, ["none", "first token", "all tokens"], known)
    y = found.pivot(index="pair_id", columns="schedule", values="y")
    prompts = estimands.prompt_tokens(this.subject, [this.pairs[0]])
    texts = outcomes.continuations(this.subject, *prompts, [this.openers["T2"]])
    plain = 0.0
    for (text, mask), sign in zip(texts, (1, -1), strict=True):
        with torch.no_grad():
            logits = this.subject.model(torch.cat([prompts[1], text[:, :-1]], dim=1)).logits
        plain += sign * float(text_log_prob(logits, text, mask))
    assert y.loc[this.pairs[0].pair.id, "none"] == pytest.approx(plain, abs=1e-3)
    assert (y["none"] > y["first token"]).all() and not np.allclose(y["first token"], y["all tokens"])


ARMS = [(Clamp("whole MLP"), "none"), (Clamp("whole MLP"), "all tokens")]


@pytest.fixture(scope="module")
def yes() -> Study:
    """Answers repeat "yes", which is no refusal; nothing reads their content."""
    study = cue_study(compiled(Program()), n=4)
    pairs = cue_pairs(study.subject.tokenizer, "on low", "on high", n=4)
    study.subject.model.lm_head.weight.data[study.openers["T2"].comply[0], 0] = 1e-3
    return replace(study, pairs=tuple(pairs))


def judge(request: str, answer: str) -> str:
    assert answer == "yes yes yes"
    return f"own {request}"


CASES = {  # judge of the study, a judge model, whether the language is the embedded one, the label, the content
    "nothing reads content": (None, "", False, "harmful", ""),
    "the study's own judge": (judge, "", False, "harmful", "own {request}"),
    "a judge model decides both, before the study's own": (judge, "some/model", False, "refusal", "refusal"),
    "as does the exact judge of the embedded language": (judge, "", True, "exact {request}", "exact {request}"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_labels_by_the_opener_and_by_content(yes: Study, monkeypatch: pytest.MonkeyPatch, case: tuple) -> None:
    own, model, is_embedded, label, content = case
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
