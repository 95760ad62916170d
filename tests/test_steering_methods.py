"""Steering methods on models whose mediator was planted by hand, and what their parts promise on made-up activations."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import GATE_NEURON, OUT, word_tokenizer
from steering_lab import fitted, prompts

from companion.base.errors import InputError
from companion.generation import hooks, outcomes
from companion.steering import adasteer, budget, controls, extraction, methods


@pytest.fixture(scope="module")
def fit() -> extraction.Fit:
    return fitted()


def log_odds(fit: extraction.Fit, made: hooks.Steering, wanted: str) -> np.ndarray:
    texts = fit.prompts.text[fit.prompts["class"] == wanted].tolist()
    steer = partial(hooks.applied, fit.subject, made)
    return outcomes.log_odds(fit.subject, texts, fit.openers, steer)["log_odds"].to_numpy()


def test_a_planted_mediator_is_recovered(fit: extraction.Fit) -> None:
    sizes = np.linalg.norm(extraction.rejection(fit, "mlp_out"), axis=-1)
    assert sizes[2] > 100 * sizes[[0, 1, 3]].max()
    v = extraction.rejection(fit, "mlp_out")[2]
    assert v[OUT] == pytest.approx(-1.5, rel=0.02) and abs(v[OUT]) > 0.999 * np.linalg.norm(v)
    neurons = np.abs(extraction.rejection(fit, "neurons")[2])
    assert neurons.argmax() == GATE_NEURON and neurons.sum() < 1.001 * neurons.max()


def test_targeted_steering_makes_a_complied_prompt_a_refused_one_and_spares_the_rest(fit: extraction.Fit) -> None:
    plain = {name: log_odds(fit, methods.none(fit), name) for name in extraction.CLASSES}
    assert plain["complied"].mean() - plain["refused"].mean() == pytest.approx(1.5, rel=0.02)
    layer = methods.layer_form(fit, layers=[2], gated=False, components=0)
    neuron = methods.neuron_form(fit, neurons={2: [GATE_NEURON]}, gated=False)
    for made in (layer, neuron):
        np.testing.assert_allclose(log_odds(fit, made, "complied"), plain["refused"].mean(), atol=0.01)
        np.testing.assert_allclose(log_odds(fit, made, "refused"), plain["refused"], atol=0.01)
    wrong = methods.neuron_form(fit, neurons={2: [0, 1]}, gated=False)
    np.testing.assert_allclose(log_odds(fit, wrong, "complied"), plain["complied"], atol=0.01)
    half = replace(layer, strength=0.5)
    assert log_odds(fit, half, "complied").mean() == pytest.approx(
        (plain["complied"].mean() + plain["refused"].mean()) / 2, abs=0.05
    )


def test_the_gate_opens_for_harm_and_the_shuffled_one_as_often_for_anything(fit: extraction.Fit) -> None:
    gated = methods.layer_form(fit, layers=[2], components=0, gate=methods.mid_gate(fit, token="last", layer=1))
    texts, harmful = fit.prompts.text.tolist(), (fit.prompts.kind == "harmful").to_numpy()
    # "off" and "well" leave nothing at the last token to tell them apart in this model, "on" does.
    values = budget.gate_values(fit.subject, gated, texts)
    assert (values[~harmful] == 0).all() and (values[(fit.prompts["class"] == "complied").to_numpy()] > 0).all()
    oracle = controls.oracle_gate(fit, steering=gated, harmful=[t for t, h in zip(texts, harmful, strict=True) if h])
    np.testing.assert_array_equal(budget.gate_values(fit.subject, oracle, texts), harmful)
    shuffled = controls.shuffled_gate(fit, steering=gated)
    again = budget.gate_values(fit.subject, shuffled, texts[:5])
    drawn = budget.gate_values(fit.subject, shuffled, texts)
    np.testing.assert_array_equal(drawn[:5], again)
    assert 0 < (drawn > 0).mean() < 1 and ((drawn > 0) != (values > 0)).any()


def test_every_method_meets_the_same_budget(fit: extraction.Fit) -> None:
    texts = fit.prompts.text[fit.prompts["class"] == "complied"].tolist()
    like = methods.layer_form(fit, layers=[2], gated=False, components=0)
    made = [
        like,
        methods.neuron_form(fit, neurons={2: [GATE_NEURON]}, gated=False),
        methods.fixed(fit, layers=[1, 2]),
        methods.alphasteer(fit, layers=[2], keep=1.0),
        controls.random_isotropic(fit, like=like, seed=1),
        controls.elsewhere(fit, layers=[3]),
    ]
    for one in made:
        met = budget.to_budget(fit.subject, one, texts, 0.7)
        assert budget.rms(budget.added_norms(fit.subject, met, texts)) == pytest.approx(0.7, rel=0.01)
    with pytest.raises(InputError, match="adds 0"):
        budget.to_budget(fit.subject, replace(like, gate=lambda p: torch.zeros(len(p.ids))), texts, 0.7)


def test_several_budgets_are_met_from_one_set_of_measurements(
    fit: extraction.Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method whose spending rises with the square of its strength: proportional steps alone would swing around it."""
    texts = fit.prompts.text[fit.prompts["class"] == "complied"].tolist()
    rounds = []

    def squared(_: object, steered: list[hooks.Steering], texts: list[str]) -> np.ndarray:
        rounds.append(len(steered))
        return np.array([[one.strength**2] * len(texts) for one in steered])

    monkeypatch.setattr(budget, "added_norms_each", squared)
    wanted = [0.01, 0.3, 1.0, 90.0]
    found = budget.to_budgets(fit.subject, hooks.Steering("square"), texts, wanted)
    assert [one.strength**2 for one in found if not isinstance(one, str)] == pytest.approx(wanted, rel=0.01)
    assert len(rounds) <= 6 and rounds[0] == 1 and rounds[1] == 3, "one passes at once, the others share their rounds"

    def bounded(_: object, steered: list[hooks.Steering], texts: list[str]) -> np.ndarray:
        return np.array([[min(one.strength, 2.0)] * len(texts) for one in steered])

    monkeypatch.setattr(budget, "added_norms_each", bounded)
    near, far = budget.to_budgets(fit.subject, hooks.Steering("bounded"), texts, [0.5, 3.0])
    assert not isinstance(near, str) and near.strength == pytest.approx(0.5, rel=0.01)
    assert isinstance(far, str) and "did not settle" in far


def test_a_push_is_moved_with_all_that_it_looks_at(fit: extraction.Fit) -> None:
    texts = fit.prompts.text.tolist()
    late = adasteer.adasteer_released(fit, 0.5, layers=[3])
    moved = controls.elsewhere(fit, 0.5, layers=[1], like=late)
    assert [edit.layer for edit in moved.edits] == [1] and moved.gate is late.gate
    norms = budget.added_norms(fit.subject, late, texts)
    np.testing.assert_allclose(budget.added_norms(fit.subject, moved, texts), norms, rtol=1e-6)
    assert norms.max() > 0
    with pytest.raises(InputError, match="steers 1 layers; expected as many"):
        controls.elsewhere(fit, layers=[0, 1], like=late)


def test_swapping_the_labels_turns_the_direction_around(fit: extraction.Fit) -> None:
    swapped = prompts()
    harmful = swapped.kind == "harmful"
    swapped.loc[harmful, "refused"] = ~swapped.loc[harmful, "refused"].astype(bool)
    other = replace(fit, prompts=swapped.assign(**{"class": extraction.classes(swapped)}))
    np.testing.assert_allclose(extraction.rejection(other), -extraction.rejection(fit))
    # The closed loop is one-sided: with the labels swapped it would push towards complying.
    pushed = methods.layer_form(other, layers=[2], gated=False, components=0)
    assert log_odds(fit, pushed, "refused").mean() > 1


def test_adasteer_steers_as_its_laws_say_and_the_released_one_knows_one_direction(fit: extraction.Fit) -> None:
    flat = methods.Affine(0.0, 0.0, 0.0, 1.0)
    laws = tuple(adasteer.Law(*adasteer.decision_line(fit, one), flat) for one in ("refused", "benign"))
    law_r, law_c = replace(laws[0], rule=methods.Affine(-1.0, 1.0, 0.0, 1.0)), laws[1]
    made = adasteer.adasteer(fit, laws=(law_r, law_c), layers=[2])
    texts = {name: fit.prompts.text[fit.prompts["class"] == name].tolist() for name in extraction.CLASSES}
    spent = {name: budget.added_norms(fit.subject, made, texts[name]).mean() for name in ("refused", "complied")}
    assert spent["refused"] < 0.05 * spent["complied"]
    assert log_odds(fit, made, "complied").mean() < 0.1
    learned = adasteer.adasteer(fit, layers=[2])
    assert log_odds(fit, learned, "complied").mean() < log_odds(fit, methods.none(fit), "complied").mean()
    released = adasteer.adasteer_released(fit, layers=[2], harmfulness=methods.Affine(0.0, 0.2, 0.0, 1.0))
    x = torch.zeros(2, 3, fit.subject.d_model)
    at = hooks.Prompt(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), torch.tensor([2, 2]))
    for name, law in (("r", laws[0]), ("c", laws[1])):
        at.read[f"position {name}"] = torch.tensor(np.stack([law.line.origin, law.line.origin + law.line.direction]))
    moved = released.edits[0].delta(x, at)[:, 0].numpy()
    v = extraction.rejection(fit)[2]
    assert np.allclose(np.abs(moved @ v), np.linalg.norm(moved, axis=-1) * np.linalg.norm(v), rtol=1e-4)


def test_a_harmfulness_direction_between_equal_classes_is_named(fit: extraction.Fit) -> None:
    same = np.ones_like(fit.last["resid_post"])
    with pytest.raises(InputError, match="benign and complied harmful prompts have the same activations"):
        extraction.harmfulness(replace(fit, last={**fit.last, "resid_post": same}))


def test_the_released_vector_must_be_free_to_push_towards_refusing(fit: extraction.Fit) -> None:
    """Its sign is the opposite of the paper's: by default it lowers the log-odds, and a positive clamp cannot."""
    made = adasteer.adasteer_released(fit, layers=[2])
    assert log_odds(fit, made, "complied").mean() < log_odds(fit, methods.none(fit), "complied").mean()
    with pytest.raises(InputError, match="points towards complying"):
        adasteer.adasteer_released(fit, layers=[2], rejection=methods.Affine(0.0025, 0.25, 0.0, 0.25))


def test_the_null_space_leaves_benign_activations_alone(fit: extraction.Fit) -> None:
    rng = np.random.default_rng(0)
    benign = rng.normal(size=(40, 8)) @ np.diag([5, 5, 5, 5, 0, 0, 0, 0])
    np.testing.assert_allclose(benign @ methods.low_variance(benign, 0.5), 0, atol=1e-9)
    made = methods.alphasteer(fit, layers=[2])
    texts = {name: fit.prompts.text[fit.prompts["class"] == name].tolist() for name in ("benign", "complied")}
    spent = {name: budget.added_norms(fit.subject, made, texts[name]).mean() for name in texts}
    assert spent["benign"] < 0.05 * spent["complied"]


def test_random_directions_follow_their_family(fit: extraction.Fit) -> None:
    noise = np.random.default_rng(0).normal(size=fit.last["resid_post"].shape) * (np.arange(fit.subject.d_model) < 4)
    fit = replace(fit, last={**fit.last, "resid_post": fit.last["resid_post"] + noise})
    like = methods.fixed(fit, layers=[2])
    x, at = torch.zeros(1, 1, fit.subject.d_model), hooks.Prompt(*[torch.ones(1, 1, dtype=torch.long)] * 3)
    for seed in (0, 1):
        drawn = [
            make(fit, like=like, seed=seed).edits[0].delta(x, at)[0, 0].numpy()
            for make in (controls.random_isotropic, controls.random_covariance)
        ]
        for vector in drawn:
            assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(extraction.rejection(fit)[2]), rel=1e-5)
        assert np.abs(drawn[1][4:]).max() < 0.05 < np.abs(drawn[0][4:]).max()


def test_positions_are_affine_invariant() -> None:
    rng = np.random.default_rng(0)
    x, zero, one = rng.normal(size=(5, 6)), rng.normal(size=6), rng.normal(size=6)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    move = lambda y: 3.0 * y @ turn + 7.0  # noqa: E731
    before = methods.position(methods.scale(zero, one), x)
    np.testing.assert_allclose(methods.position(methods.scale(move(zero), move(one)), move(x)), before)
    np.testing.assert_allclose(methods.position(methods.scale(one, zero), x), 1 - before)
    np.testing.assert_allclose(methods.position_of(methods.scale(zero, one), torch.tensor(x)), before)
    np.testing.assert_allclose(methods.position(methods.scale(zero, one), np.stack([zero, one])), [0, 1], atol=1e-12)


def test_a_direction_along_which_benign_prompts_vary_is_refused() -> None:
    rng = np.random.default_rng(0)
    benign = rng.normal(size=(50, 6)) * np.array([10, 1, 1, 1, 1, 1])
    v = np.array([1.0, 0.15, 0, 0, 0, 0])
    with pytest.raises(InputError, match=r"layer 4: .* 0\.1\d of the direction is left"):
        methods.preserving(v, benign, 1, "layer 4")
    u = methods.preserving(v + np.array([0, 0.2, 0, 0, 0, 0]), benign, 1, "layer 4")
    w = v + np.array([0, 0.2, 0, 0, 0, 0])
    assert u @ w / np.linalg.norm(w) == pytest.approx(1)


@pytest.mark.parametrize(
    ("gone", "supply"), [("refused", "safety training"), ("complied", "jailbreak"), ("benign", "harmless")]
)
def test_a_missing_class_is_named_and_the_rest_stays_usable(fit: extraction.Fit, gone: str, supply: str) -> None:
    left = extraction.fit_of(fit, (fit.prompts["class"] != gone).to_numpy())
    made = extraction.fit_directions(left)
    assert made.counts[gone] == 0 and getattr(made, gone) is None
    assert (made.rejection is None) == (gone != "benign") and (made.harmfulness is None) == (gone != "refused")
    with pytest.raises(InputError, match=supply):
        methods.layer_form(left, gated=False)
    assert methods.none(left).edits == ()


def test_saved_directions_hold_for_one_model_and_template(fit: extraction.Fit, tmp_path: Path) -> None:
    made = extraction.fit_directions(fit)
    extraction.save_directions(made, fit, tmp_path)
    again = extraction.load_directions(tmp_path, fit.subject)
    assert made.rejection is not None and again.rejection is not None
    np.testing.assert_array_equal(again.rejection, made.rejection)
    with pytest.raises(InputError, match="model_sha256"):
        extraction.load_directions(tmp_path, replace(fit.subject, sha256="other"))
    with pytest.raises(InputError, match="template_sha256"):
        extraction.load_directions(tmp_path, replace(fit.subject, tokenizer=word_tokenizer("{{ messages }}")))
    (tmp_path / extraction.FILE).write_bytes(b"torn")
    with pytest.raises(InputError, match="not the file of its manifest"):
        extraction.load_directions(tmp_path, fit.subject)


def test_saved_directions_are_the_same_bytes_every_time(fit: extraction.Fit, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        extraction.save_directions(extraction.fit_directions(fit), fit, folder)
    for name in (extraction.FILE, extraction.MANIFEST):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_a_users_directions_are_compared_layer_by_layer(fit: extraction.Fit, tmp_path: Path) -> None:
    own, folder = extraction.fit_directions(fit), tmp_path / extraction.SUPPLIED
    assert extraction.find_supplied(tmp_path) is None
    extraction.save_directions(own, fit, folder)
    assert extraction.find_supplied(tmp_path) == folder
    same = extraction.cosines(own, extraction.supplied(folder, fit.subject))
    np.testing.assert_allclose(same[["rejection", "harmfulness"]].loc[2], 1.0)
    (folder / extraction.MANIFEST).unlink()
    (folder / extraction.FILE).unlink()
    assert own.refused is not None and own.complied is not None
    samples = {"refused": own.complied[:, None].repeat(2, 1), "complied": own.refused[:, None]}
    np.savez(folder / "theirs.npz", **samples)
    path = extraction.find_supplied(tmp_path)
    assert path is not None
    turned = extraction.cosines(own, extraction.supplied(path, fit.subject))
    assert list(turned.columns) == ["rejection"], "no class to make the harmfulness direction of"
    assert turned.rejection[2] == pytest.approx(-1.0)
    still = extraction.cosines(own, {"rejection": np.zeros((fit.subject.n_layers, fit.subject.d_model))})
    assert still.rejection.isna().all()


def test_what_cannot_be_compared_says_what_was_expected(fit: extraction.Fit, tmp_path: Path) -> None:
    folder = tmp_path / extraction.SUPPLIED
    folder.mkdir()
    with pytest.raises(InputError, match="holds 0 files; expected one"):
        extraction.find_supplied(tmp_path)
    wide = (fit.subject.n_layers + 1, 1, fit.subject.d_model)
    for arrays, message in (
        ({"rejection": np.ones(wide)}, "leave the embedding's own row out"),
        ({"north": np.ones((fit.subject.n_layers, 1, fit.subject.d_model))}, "expected two classes or a direction"),
    ):
        np.savez(folder / "a.npz", **arrays)
        with pytest.raises(InputError, match=message):
            extraction.supplied(folder / "a.npz", fit.subject)
    (folder / "b.npz").write_bytes(b"")
    with pytest.raises(InputError, match="holds 2 files"):
        extraction.find_supplied(tmp_path)


def test_published_arrays_are_read_and_pickles_are_not(tmp_path: Path) -> None:
    arrays = {"refused": np.ones((2, 3, 4)), "complied": np.zeros((2, 1, 4))}
    np.savez(tmp_path / "a.npz", **arrays)
    np.testing.assert_array_equal(extraction.read_samples(tmp_path / "a.npz")["refused"], arrays["refused"])
    np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], dtype=object))
    for name, message in (
        ("b.npz", "cannot be read"),
        ("c.pt", "safetensors.torch"),
        ("d.csv", "expected .safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            extraction.read_samples(tmp_path / name)


def test_the_closed_loop_is_one_sided_and_bounded(fit: extraction.Fit) -> None:
    edit = methods.layer_form(fit, layers=[2], gated=False, components=0).edits[0]
    means = extraction.fit_directions(fit, "mlp_out")
    assert means.refused is not None and means.complied is not None
    v = means.refused[2] - means.complied[2]
    along = torch.tensor([-9.0, 0.0, 0.5, 1.0, 2.0])  # 0 at the complied mean, 1 at the refused one
    x = (torch.tensor(means.complied[2]) + along[:, None] * torch.tensor(v)).float()[:, None]
    at = hooks.Prompt(*[torch.zeros(5, 1, dtype=torch.long)] * 3)
    moved = edit.delta(x, at)[:, 0].numpy() @ v / (v @ v)
    np.testing.assert_allclose(moved[1:], [1, 0.5, 0, 0], atol=0.01)
    assert moved[0] == pytest.approx(1, abs=0.05)
