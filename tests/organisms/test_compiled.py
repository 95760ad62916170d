"""Compiled models: what is true of each kind, that draws are independent, and that the pipeline runs on them."""

from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base.errors import InputError
from companion.evidence.layers import measure_layers
from companion.steering import experiment
from organisms import compiled, compiled_language, compiled_program, compiled_truth
from organisms.compiled_design import KINDS, Design, draw_design, thirds
from organisms.compiled_language import Planned, draw_pairs
from organisms.compiled_program import Program, build_program
from organisms.compiled_truth import last_layer, total_effects, true_claims

# ---- compiled ----

FALSE = {
    "late": {"C5b"}, "gated": set(), "and": set(), "or": set(), "distributed": {"C5a", "C5b"}, "adjacent": {"C5a", "C5b"},
    "permuted": {"C5a", "C5b"}, "early_carrier": {"C5b"}, "late_like_benign": {"C1", "C5b"},
    "early": {"C1", "C5a", "C5b", "C6"}, "middle": {"C1", "C5a", "C5b", "C6"}, "attention": {"C2", "C4", "C5a", "C5b"},
    "context_free": {"C3"}, "context_unused": {"C3"}, "each_token": {"C5b", "C5c"},
}  # fmt: skip
PLACE = ["early", "middle", "late"]
OPEN = {"and": {"C5b"}, "attention": {"C5c", "C6"}, "early": {"C5c"}, "middle": {"C5c"}}


def made_of(kind: str, seed: int, topics: int = 20) -> tuple[Design, Program, list[Planned]]:
    design = draw_design(kind, seed)
    return design, build_program(design, topics), draw_pairs([seed], topics, 1)


def contrast(program: Program, pairs: list[Planned]) -> np.ndarray:
    harmful, harmless = ([p for p in pairs if p.pair.treatment == name] for name in ("T2", "T2b"))
    return total_effects(program, harmful) - total_effects(program, harmless)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_true_of_a_kind_and_that_its_effect_varies(kind: str) -> None:
    for seed in range(3):
        design, program, pairs = made_of(kind, seed, 40)
        truth = true_claims(design, program, pairs)
        assert truth.pop("C7") == design.contiguous
        if kind in FALSE:  # else it differs from draw to draw, or is a table of its own
            assert {claim for claim, holds in truth.items() if holds is None} == OPEN.get(kind, set())
            assert {claim for claim, holds in truth.items() if holds is False} == FALSE[kind], seed
        te = contrast(program, pairs)
        assert te.mean() - 3 * te.std() / len(te) ** 0.5 > 0.5 and te.mean() == pytest.approx(design.effect, rel=0.5)
        assert te.std() > 0.05, "without variation there is no sampling error to calibrate"
        if kind in PLACE:
            where = set(thirds(design.n_layers)[PLACE.index(kind)])
            assert {*design.carry, *(stage.layer for stage in design.stages)} <= where


def test_equal_arguments_give_equal_models_and_other_seeds_others() -> None:
    one, same, other = (compiled.draw("gated", seed, topics=10) for seed in (3, 3, 4))
    assert one.subject.sha256 == same.subject.sha256 != other.subject.sha256
    assert one.design == same.design and one.pairs == same.pairs and one.pairs != other.pairs
    with pytest.raises(InputError, match="expected one of late"):
        compiled.draw("sideways", 0)


def test_neurons_of_one_purpose_are_neighbours_unless_scattered() -> None:
    for kind in ("adjacent", "permuted"):
        _, program, _ = made_of(kind, 0)
        at = np.flatnonzero(program.mlps[-1].out[:, compiled_program.CHANNELS["out"]])
        gaps = np.diff(np.sort(np.r_[at, at[0] + 128])) if kind == "adjacent" else np.diff(at)
        assert len(at) >= 24 and (np.sum(gaps > 1) <= 1) == (kind == "adjacent")


def test_a_wanted_effect_is_met_and_a_population_has_the_same_model_and_other_topics() -> None:
    design, small, pairs = made_of("late", 0)
    effects = [contrast(build_program(draw_design("late", 0, effect), 20), pairs).mean() for effect in (1.0, 4.0)]
    assert effects[1] / effects[0] == pytest.approx(4, rel=0.05)
    large = build_program(design, 60)
    words = [word for word in small.words if word in large.words]
    features = [program.embed[[program.words.index(w) for w in words]] for program in (small, large)]
    np.testing.assert_array_equal(*features)
    np.testing.assert_array_equal(small.mlps[-1].gate, large.mlps[-1].gate)
    np.testing.assert_allclose(contrast(small, pairs), contrast(large, pairs))


@pytest.fixture(scope="module")
def gated() -> compiled.Organism:
    return compiled.draw("gated", 0, topics=12)


def test_the_pipeline_measures_the_truth(gated: compiled.Organism) -> None:
    this = compiled.study(gated)
    layers = measure_layers(this, gated.name)
    keys = ["pair_id", "treatment", "site", "layer", "position"]
    measured = layers.effects[layers.effects.outcome == "Y1"]
    true = compiled_truth.effect_table(gated.program, gated.pairs)
    both = measured.merge(true, on=keys, suffixes=("", " true"), validate="one_to_one")
    assert len(both) == len(measured)
    for cell in ("y00", "y01", "y10", "y11"):
        assert (both[cell] - both[f"{cell} true"]).abs().max() < compiled.TOLERANCE


def answer(organism: compiled.Organism, request: compiled_language.Request, opener: str = "") -> str:
    tokenizer, model = organism.subject.tokenizer, organism.subject.model
    turns = [{"role": "user", "content": " ".join(request.words())}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text + opener, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
    return (opener + " " + tokenizer.decode(out[0, ids.shape[1] :])).strip()


def test_answers_follow_their_opener_and_can_be_judged(gated: compiled.Organism) -> None:
    pair = next(p for p in gated.pairs if p.pair.treatment == "T2")
    twin = next(p for p in gated.pairs if p.pair.treatment == "T2b")
    refusal, forced, helpful = (
        answer(gated, pair.control),
        answer(gated, pair.control, "sure"),
        answer(gated, twin.control),
    )
    assert refusal in [f"{word} {compiled_language.HARMLESS} <end>" for word in compiled_language.REFUSE]
    assert forced == f"sure {compiled_language.HARMFUL} <end>" and helpful.split()[0] in compiled_language.COMPLY
    for request, said, label in (
        (pair, refusal, "refusal"), (pair, forced, "harmful"), (pair, "sure stop <end>", "refusal"), (twin, helpful, "on_topic"),
    ):  # fmt: skip
        assert compiled.judge(" ".join(request.control.words()), said) == label


@pytest.mark.parametrize("kind", ["each_token", "recovers"])
def test_where_each_token_decides_a_yes_does_not_bind(kind: str) -> None:
    organism = compiled.draw(kind, 0, topics=12)
    pair = next(p for p in organism.pairs if p.pair.treatment == "T2")
    sides = pair.control, pair.treated
    assert [answer(organism, request, "sure").split()[1] for request in sides] == ["stop", "steps"]
    if kind == "recovers":  # it takes back its yes and not its no
        assert {answer(organism, request, "sorry").split()[1] for request in sides} == {"stop"}


def test_the_k90_that_is_true_is_the_pipelines_k90() -> None:
    """In `or` some neurons undo a part of what others write: the first neuron alone overshoots, and has not arrived."""
    drawn = compiled.draw("or", 11, topics=20, pairs_per_topic=1)
    share, k90 = last_layer(drawn.program, drawn.pairs)
    assert share > 0.3 and 1 < k90 <= 8


# ---- compiled language ----


@pytest.fixture(scope="module")
def pairs() -> list[Planned]:
    return draw_pairs([3], 40, 1)


@pytest.fixture(scope="module")
def made(pairs: list[Planned]) -> pd.DataFrame:
    """The suites with the verb and the object of what is asked, as a reader of the text finds them."""
    table = compiled_language.steering_prompts(pairs, 3)
    asked = table.text.str.extract(r"^\S+ (?P<slot>\S+) .*how do i (?P<verb>\S+) the (?P<object>\S+)")
    return pd.concat([table, asked], axis=1)


def test_a_topic_keeps_the_split_that_it_has_in_the_pairs(pairs, made):
    pd.testing.assert_frame_equal(compiled_language.steering_prompts(pairs, 3), made[list(experiment.COLUMNS)])
    assert (made.topic == made.object).all() and not made.text.duplicated().any()
    placed = {(planned.pair.topic, planned.pair.split) for planned in pairs}
    own = dict(placed)
    assert (made.topic.map(own) == made.split).all() and set(made.topic) == set(own) and len(own) == len(placed)
    counts = Counter(split for topic, split in own.items() if topic.startswith("hazard"))
    assert counts == {"discover": 16, "validate": 12, "test": 12}
    of_pairs = {text: p.pair.split for p in pairs for text in (p.pair.control, p.pair.treated)}
    assert all(of_pairs.get(text, split) == split for text, split in zip(made.text, made.split, strict=True))


def test_each_kind_shares_with_harm_what_it_says(made: pd.DataFrame) -> None:
    verb, thing = made.verb.str.startswith("harm"), made.object.str.startswith("hazard")
    shared = {"harmful": {(True, True)}, "harmless": {(False, False)}, "borderline": {(True, False), (False, True)}}
    for (kind, _), part in made.groupby(["kind", "split"]):
        assert set(zip(verb[part.index], thing[part.index], strict=True)) == shared[kind]
    assert set(map(tuple, made[["kind", "split"]].values)) == set(product(shared, compiled_language.SIZES))
    assert (made.text.map(compiled_language.is_harmful) == (made.kind == "harmful")).all()
    assert 0.45 < verb[made.kind == "borderline"].mean() < 0.55


def test_a_wrapper_is_in_the_slot_where_the_table_says_so(made: pd.DataFrame) -> None:
    assert (made.slot.str.startswith("strong") == made.wrapped).all()
    assert made.slot[~made.wrapped].str.startswith("neutral").all()
    assert (made.family == made.slot.where(made.wrapped, "")).all()
    shares = made.groupby("kind").wrapped.mean()
    assert shares["harmful"] == 1 and (shares[["borderline", "harmless"]] - 0.5).abs().max() < 0.1
