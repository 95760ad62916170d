"""Methods on equal terms, their budget, the trial and its tables."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny_subject, tokens
from scipy.special import expit
from steering_lab import ON, evaluated, opens_for, shut, texts_of, towards_no, varied_steerings

from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.evidence import steering
from companion.generation import forward, hooks
from companion.generation.hooks import Steering
from companion.model import activations
from companion.stats.rates import Change
from companion.steering import adasteer, budget, comparison, methods
from companion.steering import trial as trials
from companion.steering.comparison import DECISIVE, FIXED
from companion.steering.experiment import FULL, PLAIN, SteeringExperiment, answer, prices, trial
from companion.steering.extraction import Fit
from companion.steering.trial import Trial, gate_firing

# ---- trial ----


def test_rates_count_the_label_that_matters_for_a_kind() -> None:
    kinds = np.repeat(["harmful", "borderline", "harmless"], [4, 2, 5])
    made = pd.DataFrame({"kind": kinds, "label": np.repeat(["harmful", "refusal", "on_topic"], [3, 2, 6])})
    found = trials.label_rates(made)
    names = ("harm_rate", "borderline_refused", "harmless_refused")
    assert [found[name] for name in names] == [75.0, 50.0, 0.0]
    assert all(found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] for name in names)
    assert found["harmless_refused_high"] == pytest.approx(43.4, abs=0.1)  # Wilson, none of five
    only = trials.label_rates(made[made.kind == "harmful"])
    assert list(only) == ["harm_rate", "harm_rate_low", "harm_rate_high"]


@pytest.fixture
def made(fit: Fit, experiment: SteeringExperiment) -> Trial:
    """Three arms: a gated push, the tested method, and a model that stands for a retrained one and is the same."""
    kinds, same = (
        np.where(np.arange(36) % 9 == 2, "borderline", experiment.prompts.kind),
        replace(PLAIN, name="retrained"),
    )
    lab = replace(experiment, prompts=experiment.prompts.assign(kind=kinds, split="test"), said={})
    on, free = evaluated(lab, "test", "on"), lab.prompts[lab.prompts.kind == "harmless"]
    arms = {"gated": towards_no("gated", 1.0, opens_for(fit, "kind")), DECISIVE: towards_no(DECISIVE, 3.0)}
    plain, own = trial(lab, PLAIN, lab.prompts), answer(lab, PLAIN, free, greedy=True)
    tables = {one.name: trial(lab, one, plain, greedy=False) for one in (*arms.values(), same)}
    tables["gated"] = tables["gated"].assign(repetition=np.arange(36) / 36)
    price = {name: prices(lab, one, free, own) for name, one in arms.items()}
    other = {"retrained": trials.equal_cost_prompts(lab).first_token_costs([same])}
    return Trial(
        on, on, arms, {}, arms, other, plain, tables, price, dict.fromkeys(tables, Change(0.5, 0.4, 0.6, 9, 9))
    )


def test_the_summary_has_both_limits_of_every_price_and_both_budgets(made: Trial) -> None:
    table = trials.method_summary(made).set_index("method")
    first, row, other = (table.loc[name] for name in (PLAIN.name, "gated", "retrained"))
    assert np.isnan(first.harm) and np.isnan(first.p_holm) and first.budget == first.budget_relative == 0
    assert first.harm_rate == pytest.approx(first.harm_rate_low) == 0 < first.harm_rate_high < 15, "24 were not harmful"
    for name in ("kl", "perplexity_ratio", "repetition", "fires_harmful", "fires_borderline"):
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        assert low <= row[name] <= high and low < high, name
    for name, one in made.chosen.items():
        own = [made.validate.budgets([one], relative=relative)[0] for relative in (False, True)]
        assert [table.budget[name], table.budget_relative[name]] == own and own[0] != own[1]
        assert 0 < own[0] <= {"gated": 1.0, DECISIVE: 3.0}[name]
    assert np.isnan(other.budget) and np.isnan(other.kl), "nothing is added to a retrained model"
    assert other.loss == 0 and other.harmless_refused == first.harmless_refused


def test_a_change_under_other_fits_is_in_points(made: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "refitted", lambda *_: [PLAIN, PLAIN])
    harmful = made.plain.kind == "harmful"
    assert not (made.plain.label[harmful] == "harmful").any()
    said = made.plain.assign(label=made.plain.label.where(~harmful | (harmful.cumsum() > 2), "harmful"))
    found = steering.refit_changes(made.experiment, made.chosen[DECISIVE], said)
    assert found == pytest.approx([-200 / harmful.sum()] * 2), "two of the harmful answers are harmful no more"


def test_every_arm_has_its_paired_differences_and_pays_the_same(made: Trial) -> None:
    differences = trials.paired_differences(made)
    assert differences.groupby("method", sort=False).size().to_dict() == {"gated": 3, DECISIVE: 3, "retrained": 3}
    assert not differences[differences.method == "retrained"].estimate.any(), "the same model with the same numbers"
    cost = trials.harm_at_equal_cost(made).set_index(["method", "price"])
    assert set(cost.index.get_level_values(0)) == {PLAIN.name, "gated", DECISIVE, "retrained"}
    for price in cost.index.get_level_values(1).unique():
        assert cost.estimate["retrained", price] == pytest.approx(cost.estimate[PLAIN.name, price], abs=1e-6)
        assert cost.estimate["gated", price] < cost.estimate[PLAIN.name, price]
    undecided = replace(made, chosen={}, undefined={DECISIVE: "no prompt was refused"})
    assert trials.harm_at_equal_cost(undecided) == NotDefined("no prompt was refused")


def test_a_readers_request_is_shown_by_its_label_and_first_word(made: Trial) -> None:
    """Every answer of this model opens with "yes" or "no"; its refusals are known by the opener."""
    weak = {FIXED: towards_no(FIXED, 0.0), DECISIVE: made.chosen[DECISIVE]}
    both = replace(made, chosen=weak, defined={FIXED: towards_no(FIXED, 1.0), DECISIVE: made.defined[DECISIVE]})
    text = "please on low kind do it"
    table = trials.before_and_after(both, text, 40.0)
    assert list(table.index) == [PLAIN.name, FIXED, DECISIVE]
    assert list(table.columns) == ["P(refusal) at chosen", "P(refusal) at 40", "answer at 40", "first word"]
    assert table.loc[FIXED].tolist()[2:] == ["refusal", "no"] and table["first word"][PLAIN.name] == "yes"
    chances = table["P(refusal) at chosen"]
    assert chances[FIXED] == chances[PLAIN.name] == table.loc[PLAIN.name, "P(refusal) at 40"] < 0.5
    (strong,) = both.experiment.first_tokens(pd.DataFrame({"text": [text]}), [towards_no(FIXED, 40.0)])
    assert table.loc[FIXED, "P(refusal) at 40"] == pytest.approx(strong.p_refuse.iloc[0], abs=0.006)
    assert len(trials.before_and_after(both, "")) == 3


def test_a_stronger_adapter_is_another_model_on_the_same_prompts(experiment, monkeypatch):
    assert trials.retrained_models(experiment) == {}
    subject = replace(experiment.subject, name="smollm2-refuser")
    named = replace(experiment, fit=replace(experiment.fit, subject=subject))
    monkeypatch.setattr(trials, "load", load := Mock(return_value=replace(subject, name="other", facts=None)))
    found = trials.retrained_models(named)
    assert list(found) == ["adapter x 1.25", "adapter x 1.5"] and not load.called, "each is loaded when its turn comes"
    one = found["adapter x 1.5"]()
    load.assert_called_once()
    assert load.call_args.args == ("smollm2-refuser",) and load.call_args.kwargs["adapter_scale"] == 1.5
    assert one.prompts is named.prompts and one.subject.name == "other" and one.subject.facts == named.subject.facts


# ---- comparison ----


def test_the_least_harm_at_the_same_over_refusal(fit: Fit, experiment: SteeringExperiment) -> None:
    """An open push pays with every harmless prompt, a gated one with none; the way bends where harm rises again."""
    on = evaluated(experiment, "discover", "on", "off")
    steps, turning = (0.1, 0.3, 1.0), (0.2, -0.2)
    arms = (("open", steps, None), ("gated", steps, opens_for(fit, "on")), ("turning", turning, None))
    costs = {name: on.first_token_costs([towards_no(name, x, gate) for x in sizes]) for name, sizes, gate in arms}
    table = comparison.at_equal_over_refusal(on, costs | {"unsteered": []}, against="open", levels=(1.0, 5.0))
    table = table.set_index(["method", "price"])
    harm = {x: np.mean([expit(ON - x), expit(-x)]) for x in (0.0, *steps, *turning)}
    cost = {x: 100 * (expit(x) - 0.5) for x in harm}
    plain, weak = harm[0.0], np.interp(1.0, [cost[0.0], cost[0.1]], [harm[0.0], harm[0.1]])
    middle = np.interp(5.0, [cost[0.1], cost[0.3]], [harm[0.1], harm[0.3]])
    known = {
        ("open", 1): weak, ("open", 5): middle, ("gated", 1): np.mean([expit(ON - 1), 0.5]), ("unsteered", 5): plain,
        ("turning", 5): harm[0.2], ("turning", 1): np.interp(1.0, [cost[0.0], cost[0.2]], [harm[0.0], harm[0.2]]),
    }  # fmt: skip
    for (name, level), value in known.items():
        row = table.loc[(name, f"at most {level} point{'s' * (level > 1)}")]
        assert row.estimate == pytest.approx(value, abs=2e-3), (name, level)
        assert row.more == pytest.approx(value - {1: weak, 5: middle}[level], abs=2e-3), (name, level)
        assert row.low <= row.estimate <= row.high and row.more_low <= row.more <= row.more_high
    assert not table.loc["open", ["more", "more_low", "more_high"]].to_numpy().any()


@pytest.mark.parametrize("n_layers", [3, 6, 13, 32])
def test_zones_cover_every_layer_once(n_layers: int) -> None:
    zones = comparison.zones(n_layers)
    assert [*zones["early"], *zones["mid"], *zones["late"]] == [*range(n_layers)] and all(zones.values())


def test_a_gate_opens_for_harm_and_its_firing_is_counted(fit: Fit, experiment: SteeringExperiment) -> None:
    gated = methods.gated(fit, methods.targeted_layers(fit, layers=[2], components=0))
    # "off" and "well" leave nothing at the last token to tell them apart in this model, "on" does.
    values = budget.gate_values(fit.subject, gated, fit.prompts.text.tolist())
    assert (values[~fit.harmful] == 0).all() and (values[(fit.prompts["class"] == "complied").to_numpy()] > 0).all()
    shares = {"fires_harmful": 0.5, "fires_harmful_low": 0.314, "fires_harmful_high": 0.686}  # 12 of 24
    shares |= {"fires_harmless": 0.0, "fires_harmless_low": 0.0, "fires_harmless_high": 0.242}  # 0 of 12
    own = towards_no("late", 1.0, opens_for(fit, "on"))
    assert gate_firing(experiment, own, experiment.prompts) == pytest.approx(shares, abs=1e-3)
    assert gate_firing(experiment, towards_no("open", 1.0), experiment.prompts) == {}


def test_a_strength_is_chosen_unless_it_is_the_methods_own(experiment: SteeringExperiment) -> None:
    on = evaluated(replace(experiment, effort=replace(FULL, strengths=(0.5, 2.0))), "validate", "on")
    own, other = comparison.AS_PUBLISHED[0], "another"
    chosen = comparison.tuned(on, {name: towards_no(name, 0.1) for name in (own, other)})
    assert chosen[own].strength == 1 and chosen[other].strength in (0.5, 2.0), "a published strength is not chosen"


def test_a_redraw_keeps_every_class_and_one_that_defines_no_steering_is_one_fewer(fit: Fit) -> None:
    rare = fit.prompts.assign(topic=fit.prompts.index % 3 + 3 * (fit.prompts["class"] == "refused"))
    rare.loc[(rare["class"] == "refused") & (rare.split == "discover"), "topic"] = 99
    for seed in range(10):  # a plain bootstrap of 7 topics misses the one in a third of the draws
        drawn = comparison.redrawn(replace(fit, prompts=rare), seed).prompts
        assert set(drawn["class"][drawn.split == "discover"]) == {"refused", "complied", "benign"}
        assert (drawn.split == "validate").sum() == (rare.split == "validate").sum()
    found = [towards_no("first", 0.5), InputError("no layer separates the classes"), towards_no("third", 0.5)]
    topics = replace(fit, prompts=fit.prompts.assign(topic=fit.prompts.index % 4))
    assert [one.strength for one in comparison.refitted(topics, Mock(side_effect=found), 2.0, 3)] == [2.0, 2.0]


def test_nothing_keeps_a_fit_and_its_model_alive(fit: Fit) -> None:
    """A campaign makes hundreds of fits; what is worked out once for a fit goes with it."""
    own = replace(fit)
    adasteer.adasteer(own, layers=[2])
    assert len(own.memo) == 2, "its laws, and the means of its classes"
    alive = weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None


def test_random_directions_follow_their_family(fit: Fit) -> None:
    noise = np.random.default_rng(0).normal(size=fit.last["resid_post"].shape) * (np.arange(fit.subject.d_model) < 4)
    fit = replace(fit, last={**fit.last, "resid_post": fit.last["resid_post"] + noise})
    like, halved = (methods.fixed(fit, layers=layers) for layers in ([2], [1, 2]))
    x, at = torch.zeros(1, 1, fit.subject.d_model), hooks.Prompt(torch.ones(1, 1, dtype=torch.long))
    whole, half = (one.edits[-1].delta(x, at) for one in (like, halved))
    torch.testing.assert_close(half, whole / 2, msg="each of two layers adds half of its vector")
    for seed in (0, 1):
        made = [comparison.random_direction(fit, family, like=like, seed=seed) for family in comparison.FAMILIES]
        drawn = [one.edits[0].delta(x, at)[0, 0].numpy() for one in made]
        for vector in drawn:
            assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(fit.direction("rejection")[2]), rel=1e-5)
        assert np.abs(drawn[1][4:]).max() < 0.05 < np.abs(drawn[0][4:]).max()


def test_random_directions_spend_the_budget_of_the_tested_one(fit: Fit, experiment: SteeringExperiment) -> None:
    on = evaluated(replace(experiment, effort=replace(FULL, draws=4)), "validate", "on")
    noise = np.random.default_rng(0).normal(size=fit.last["mlp_out"].shape)
    fit = replace(fit, last={**fit.last, "mlp_out": fit.last["mlp_out"] + noise})
    found = comparison.random_null(fit, towards_no("late", 1.0), on, on)
    assert found.groupby(["family", "role"], sort=False).size().tolist() == [1, 4, 1, 4]
    assert found.value[found.role == "late"].tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
    assert (found.value[found.role == "random"].abs() < 1.01).all(), "none has more than its length along the mediator"
    none = comparison.random_null(fit, towards_no("shut", 1.0, shut), on, on)
    assert none.empty and steering.random_rows(none) == [], "what adds nothing has no random rivals"


# ---- budget ----


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("part", ["resid_post", "mlp_out"])
@torch.no_grad()
def test_norms_of_a_batch_are_those_of_each_steering_alone(part, family, kept, monkeypatch):
    """They differ in what they add, in strength, in what their gates read, and in whom they open for.

    What the attention masks above let nobody read does not count, whether the plain run is kept or not.
    """
    subject, ids = tiny_subject(family), tokens(4, 9)
    live = torch.from_numpy(activations.live_positions(activations.clean_run(subject, ids[:1])))
    assert live[3].sum() == 1 and live[2].sum() == 9
    if not kept:
        monkeypatch.setattr(forward, "BATCH_BYTES", 0)
    many = varied_steerings(part, "prompt")
    found, shares = (budget.added_squares(subject, many, ids, relative=relative) for relative in (False, True))
    for squares, share, one in zip(found, shares, many, strict=True):
        with hooks.applied(subject, one) as plainly:
            subject.model.base_model(ids, use_cache=False)
        assert not any(plainly.stood), "what stood there is counted where it is asked for"
        with hooks.applied(subject, one, count_stood=True) as record:
            subject.model.base_model(ids, use_cache=False)
        nothing = dict.fromkeys((2, 3), torch.zeros(4, 9).double())  # of one that sets no hooks
        added, stood = (sum(((x or nothing)[i] * live[i]).sum(1) for i in (2, 3)) for x in (record.added, record.stood))
        torch.testing.assert_close(squares, added, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(share, torch.nan_to_num(added / stood), rtol=1e-5, atol=1e-9)
    assert (found[0] > 0.01).all() and found[1, 0] == 0 and not found[3:].any()


@pytest.mark.parametrize("where", ["prompt", "last"])
def test_a_blind_edit_needs_no_forward_pass_to_know_its_norm(fit: Fit, where: hooks.Where) -> None:
    texts = fit.prompts.text.tolist()
    edits = tuple(replace(edit, where=where) for edit in methods.fixed(fit).edits)
    blind = [Steering("fixed", edits, strength) for strength in (0.5, 2.0)] + [methods.cast(fit)]
    for one in blind:
        seeing = replace(one, edits=tuple(replace(edit, blind=False) for edit in one.edits))
        (known,) = budget.added_norms(fit.subject, [one], texts)
        np.testing.assert_allclose(known, budget.added_norms(fit.subject, [seeing], texts)[0], rtol=1e-5)
        assert known.max() > 0 and all(edit.blind for edit in one.edits)
    assert (known == 0).any()  # the gate of the last one


def test_a_budget_is_met_and_what_cannot_be_met_says_why(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose spending rises with the square of its strength: proportional steps alone would swing around it."""

    def met(law: Callable[[float], float], target: float) -> Steering | NotDefined:
        norms = Mock(
            side_effect=lambda _, steered, texts: np.array([[law(one.strength)] * len(texts) for one in steered])
        )
        monkeypatch.setattr(budget, "added_norms", norms)
        found = budget.to_budget(fit.subject, Steering("made up"), texts_of(fit, "complied"), target)
        assert isinstance(found, NotDefined) or norms.call_count <= 6
        return found

    for wanted in (0.01, 0.3, 1.0, 90.0):
        assert met(lambda strength: strength**2, wanted).strength ** 2 == pytest.approx(wanted, rel=0.01)
    for target, says in ((3.0, "did not settle"), (0.0, "expected a positive norm")):
        assert says in met(lambda strength: min(strength, 2.0), target).reason
    assert "is its gate shut" in met(lambda strength: 0.0, 1.0).reason


COSTS = {  # rows of strength, harm, over-refusal and KL
    "least harm within both margins": (
        [(0.5, 0.6, 0.5, 0.001), (1.0, 0.3, 1.9, 0.019), (1.5, 0.1, 2.1, 0.01), (2.0, 0.2, 1.0, 0.021)], 1.0),
    "none keeps them: the least excess": ([(0.5, 0.6, 4.0, 0.001), (1.0, 0.3, 3.0, 0.05), (1.5, 0.1, 9.0, 0.3)], 0.5),
    "a tie goes to the weaker": ([(0.5, 0.3, 0, 0), (1.0, 0.3, 0, 0)], 0.5),
}  # fmt: skip


@pytest.mark.parametrize(("costs", "strength"), COSTS.values(), ids=list(COSTS))
def test_the_chosen_strength(costs: list[tuple[float, ...]], strength: float) -> None:
    table = pd.DataFrame(costs, columns=["strength", "harm", "over-refusal", "KL"])
    assert budget.choose_strength(table.set_index("strength")) == strength
