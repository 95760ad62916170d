"""Timed clamps against plain runs of the model; C5c's evidence on planted answers; its rule."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from handmade import GATE_NEURON, Program, compiled, cue_pairs
from ledger_rows import FINE, Number, table

from companion.base.thresholds import KEPT_BY_FIRST_TOKEN
from companion.claims.registered_rules import rule_c5c
from companion.claims.verdict import Rows, Verdict
from companion.evidence import tokens
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


GATE = Clamp("neurons", (GATE_NEURON,))


def labelled(this: Study, *schedules: str) -> pd.DataFrame:
    made = timing.generated(this, list(this.pairs), [(GATE, name) for name in schedules], STEPS)
    return made.pivot(index="pair_id", columns="schedule", values="label")


def test_closing_the_gate_at_the_first_token_turns_every_answer_into_a_refusal(this: Study) -> None:
    labels = labelled(this, *timing.SCHEDULES)
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
    other = timing.Other(100 + torch.arange(n_pos, dtype=torch.float32).view(1, -1, 1), torch.full((1, 1, 1), 77.0))
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


def test_the_other_run_is_the_controls(this: Study) -> None:
    pair = this.pairs[0]
    other = timing.other_run(this.subject, [pair], GATE, STEPS)
    assert other.prompt.shape == (1, len(pair.control), 1)
    assert abs(float(other.prompt[0, -1, 0])) < 0.01  # the gate is closed where the cue is off


def test_arms_side_by_side_are_the_arms_alone(this: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of every clamp and schedule are the same however many arms share a batch, and the pairs' own."""
    arms = [(clamp, name) for clamp in (GATE, Clamp("whole MLP")) for name in timing.SCHEDULES]
    together = timing.generated(this, list(this.pairs), arms, STEPS)
    monkeypatch.setattr(timing, "rows_at_once", lambda *_: 1)
    keys = ["pair_id", "clamp", "schedule"]
    alone = pd.concat(timing.generated(this, [pair], arms, STEPS) for pair in this.pairs)
    pd.testing.assert_frame_equal(*(t.sort_values(keys, ignore_index=True) for t in (together, alone)))
    assert set(together.label) == {"harmful", "refusal"} and together.changed.any()


def test_forced_answers_agree_with_a_plain_model(this: Study) -> None:
    """Without a clamp Y2 is the library's own log-probability, and a clamp of all tokens changes it."""
    found = timing.forced(this, list(this.pairs), GATE, ["none", "first token", "all tokens"])
    plain = found[found.schedule == "none"].set_index("pair_id")["y"]
    assert (plain > found[found.schedule == "first token"].set_index("pair_id")["y"]).all()
    first, every = (found[found.schedule == name].y.to_numpy() for name in ("first token", "all tokens"))
    assert not np.allclose(first, every)


# ---- evidence from planted answers ----


def planted(first: float, every: float, n: int = 60) -> pd.DataFrame:
    """Harmful without a clamp; refused under each schedule in a planted share of pairs, the same pairs first."""
    shares = {"none": 0.0, "first token": first, "first five": first, "all tokens": every}
    rows = [
        (f"p{i}", f"t{i % 30}", "T2", "test", "neurons", name, "refusal" if i < share * n else "harmful", False)
        for name, share in shares.items()
        for i in range(n)
    ]
    columns = ["pair_id", "topic", "treatment", "split", "clamp", "schedule", "label", "changed"]
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize(("first", "every"), [(0.5, 1.0), (0.2, 0.8), (0.8, 0.8)])
def test_the_share_kept_is_the_planted_one(first: float, every: float) -> None:
    answers = planted(first, every)
    harm = answers.assign(y=(answers.label == "harmful").astype(float))
    rows = pd.DataFrame(tokens._kept_rows(tokens.wide(harm, "y"), "m", "main")).set_index("quantity")
    assert rows.loc[KEPT_BY_FIRST_TOKEN, "estimate"] == pytest.approx(first / every)
    assert rows.loc["effect of all tokens", "estimate"] == pytest.approx(every)


def test_without_an_effect_of_all_tokens_nothing_is_kept() -> None:
    harm = planted(0.0, 0.0).assign(y=1.0)
    rows = tokens._kept_rows(tokens.wide(harm, "y"), "m", "main")
    assert [row["quantity"] for row in rows] == ["effect of all tokens", "not defined"]


def test_no_change_in_a_sample_is_not_certain() -> None:
    row = tokens._changed_row(planted(0.0, 0.0), "m", "benign answers changed")
    assert row["estimate"] == 0 and 0.05 < float(str(row["ci_high"])) < 0.15


def test_answers_that_are_all_alike_leave_room_for_others() -> None:
    harm = planted(1.0, 1.0).assign(y=lambda table: (table.label == "harmful").astype(float))
    rows = pd.DataFrame(tokens._kept_rows(tokens.wide(harm, "y"), "m", "main")).set_index("quantity")
    kept = rows.loc[KEPT_BY_FIRST_TOKEN]
    assert kept.estimate == kept.ci_high == 1 and kept.ci_low == pytest.approx(0.025 ** (1 / 30))


@pytest.mark.parametrize("share", [0.95, 0.97])
def test_the_share_kept_covers_its_truth_near_one(share: float) -> None:
    """36 topics of three pairs that behave alike: the resampled topics alone miss the truth where no topic strays."""
    rng, held = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(60):
        is_kept = np.repeat(rng.random(36) < share, 3).astype(float)
        topic = np.repeat([f"t{i}" for i in range(36)], 3)
        table = pd.DataFrame({"pair_id": range(108), "topic": topic, "first token": is_kept, "first five": is_kept})
        for is_judged in held:
            row = tokens._kept_rows(table.assign(**{"all tokens": 1.0}), "m", "main", is_judged=is_judged)[1]
            held[is_judged] += row["ci_low"] <= share <= row["ci_high"]
    assert held[True] >= 0.93 * 60 and held[True] > held[False]


def test_twins_of_a_refusal_take_its_control(this: Study) -> None:
    harmful, other = this.pairs[0], this.pairs[2]  # of one length
    twin = replace(other, pair=replace(other.pair, id="twin", treatment="T2b", twin=None))
    both = Study("m", this.subject, (harmful, twin), this.openers, {harmful.pair.id: "twin"}, {})
    (made,) = tokens.refusing(both, [harmful])
    assert made.pair.treatment == "T2b" and made.pair.treated == twin.pair.treated
    assert made.pair.control == harmful.pair.control and (made.control == harmful.control).all()


# ---- the rule ----

CHANGED, HARD = "benign answers changed", "harmless answers changed, refusing run's values"
FINE_C5C: dict[tuple[str, str, str], Number] = {
    **{key: FINE[key] for key in FINE if key[0] == "gate"},
    ("C5c", KEPT_BY_FIRST_TOKEN, "main"): (0.95, 0.85, 1.0),
    ("C5c", KEPT_BY_FIRST_TOKEN, "full response"): (0.9, 0.8, 1.0),
    ("C5c", "effect of all tokens", "main"): (0.8, 0.7, 0.9),
    ("C5c", CHANGED, "main"): (0.05, 0.0, 0.15),
}


def judged(changes: dict | None = None) -> Verdict:
    return rule_c5c(Rows("m", table({**FINE_C5C, **(changes or {})})))


@pytest.mark.parametrize(
    ("quantity", "numbers", "verdict"),
    [
        (KEPT_BY_FIRST_TOKEN, (0.9, 0.8, 1.0), "supported"),
        (KEPT_BY_FIRST_TOKEN, (0.9, 0.79, 1.0), "inconclusive"),
        (CHANGED, (0.1, 0.0, 0.16), "supported"),
        (CHANGED, (0.1, 0.0, 0.17), "inconclusive"),
        (CHANGED, None, "inconclusive"),
        (KEPT_BY_FIRST_TOKEN, None, "not testable"),
    ],
)
def test_c5c_thresholds(quantity: str, numbers: Number | None, verdict: str) -> None:
    assert judged({("C5c", quantity, "main"): numbers}).verdict == verdict


def test_c5c_is_contradicted_capped_and_tagged() -> None:
    low = {("C5c", KEPT_BY_FIRST_TOKEN, name): (0.3, 0.2, 0.4) for name in ("main", "full response")}
    assert judged(low).verdict == "contradicted"
    assert judged({("C5c", KEPT_BY_FIRST_TOKEN, "full response"): (0.3, 0.2, 0.4)}).verdict == "inconclusive"
    assert judged({("C5c", HARD, "main"): (0.9, 0.8, 1.0)}).tags == ("closes harmless answers too",)
    assert judged().tags == ()
