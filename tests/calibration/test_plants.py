"""Shares of what training added to a real model, and what is lost where a component is knocked out."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import passed

from companion.base import smollm2
from companion.base.files import hash_file
from companion.base.thresholds import COMPONENTS
from companion.calibration import plants, truths
from companion.calibration.campaign import read_shipped
from companion.calibration.truths import decider
from companion.mediation.estimands import with_estimands
from organisms import compiled, compiled_language, refuser

# ---- plants ----


def made_effects(trained: float, seed: int = 0) -> pd.DataFrame:
    """A model of six layers in which every component has an effect of its own, and late MLPs one of `trained` beside it.

    A wrapper takes half of it back. `direct` effects are of half the size.
    """
    rng, rows = np.random.default_rng(seed), []
    for (treatment, sign), pair in product({"T1": -1.0, "T2-T2b": 0.5}.items(), range(12)):
        size, key = sign * (1 + rng.random()), (f"{treatment}{pair}", f"topic {pair // 2}", treatment, "test")
        for site, layer in product(COMPONENTS, range(6)):
            nie = 0.1 * (layer + 1) + size * trained * (site == "mlp_out" and layer >= 4)
            for outcome, at, value in (("Y1", site, nie), ("contrast.frozen", f"{site}.direct", nie / 2)):
                rows.append((*key, at, layer, "last", outcome, 0.0, value, 9 * size - value, 9 * size))
    names = ["pair_id", "topic", "treatment", "split", "site", "layer", "position", "outcome"]
    return with_estimands(pd.DataFrame(rows, columns=[*names, "y00", "y01", "y10", "y11"]))


def test_what_training_added_lies_where_it_was_trained() -> None:
    after, before = made_effects(1.0), made_effects(0.0)
    tables = {part: plants.real_shares(part, after, before) for part in ("mlp", "early", "all")}
    keys = ["treatment", "effect", "of", "where"]
    found = {part: table.set_index(keys).sort_index() for part, table in tables.items()}
    for treatment, effect in product(("T1", "T2-T2b"), plants.MEANING):
        change, plain = (found["mlp"].loc[(treatment, effect, of)] for of in ("change", "plain"))
        assert change.share["mlp late"] == pytest.approx(1) == change.share["all that was trained"]
        assert change.share["all else"] == pytest.approx(0) and change.te.eq(0).all()
        assert plain.share["mlp early"] == pytest.approx(0.3 / 4.2) == plain.share["attn early"]
        assert found["early"].loc[(treatment, effect, "change")].share["all that was trained"] == pytest.approx(0)
    refuser_shares = found["mlp"].loc[("T1", "total", "refuser")]
    own = after[(after.treatment == "T1") & (after.outcome == "Y1")]
    late = own[(own.site == "mlp_out") & (own.layer >= 4)]
    assert refuser_shares.share["mlp late"] == pytest.approx(late.nie0.sum() / own.nie0.sum())
    low, high = refuser_shares.loc["mlp late", ["low", "high"]]
    assert low < refuser_shares.share["mlp late"] < high, "topics differ in how much training did"
    assert refuser_shares.te["attn late"] == pytest.approx(own.te.mean()) and refuser_shares.topics.eq(6).all()
    assert found["mlp"]["size"].xs("all that was trained", level="where").eq(0.5).all()
    assert found["all"].learned.all() and not {plants.TRAINED, plants.ELSE} & set(tables["all"]["where"])


@pytest.mark.parametrize("part", refuser.PARTS)
def test_what_a_part_trains_is_what_the_tables_call_learned(part: str) -> None:
    layers, modules = refuser.trained_layers(part, 30), refuser.PARTS[part][1]
    thirds = zip(plants.THIRDS, (range(10), range(10, 20), range(20, 30)), strict=True)
    for (site, own), (third, some) in product({"attn_out": refuser.ATTENTION, "mlp_out": refuser.MLP}.items(), thirds):
        trained = set(own) <= set(modules) and set(some) <= set(layers)
        assert plants.is_learned(part, site, third) == trained
        assert trained or not set(own) & set(modules) or not set(some) & set(layers), "no place is trained by half"


def test_real_plants_are_measured_once_with_the_hash_of_their_adapter(tmp_path, monkeypatch):
    for name in ("all-0", "all-1", "mlp-0"):
        (tmp_path / "refuser" / name).mkdir(parents=True)
        (tmp_path / "refuser" / name / "adapter_model.safetensors").write_bytes(name.encode())
    asked = []
    monkeypatch.setattr(smollm2, "REFUSER", tmp_path / "refuser")

    def effects(name: str) -> pd.DataFrame:
        asked.append(name)
        return made_effects(float("refuser" in name))

    monkeypatch.setattr(plants, "real_effects", effects)
    for _ in range(2):
        plants.run_real_plants(folder=tmp_path / "calibration")
    assert asked == ["smollm2-refuser", "smollm2", "smollm2-refuser-mlp", "smollm2"], "and of other seeds none"
    table = read_shipped("real_plants", tmp_path / "calibration")
    weights = {kind: tmp_path / "refuser" / f"{kind}-0" / "adapter_model.safetensors" for kind in ("all", "mlp")}
    known = {(kind, hash_file(path, {})) for kind, path in weights.items()}
    assert set(zip(table.kind, table.adapter, strict=True)) == known
    assert not table.duplicated(["kind", "treatment", "effect", "of", "where"]).any() and len(table) == 12 * (6 + 8)
    drawn = plants.trained_places(table)
    assert drawn.groupby(["kind", "effect"]).size().eq(7).all() and list(drawn.kind.unique()) == ["everything", "MLPs"]
    framed = drawn[drawn.learned & (drawn.place != "framed, together")].groupby(["kind", "effect"]).estimate.sum()
    stored = drawn[drawn.place == "framed, together"].set_index(["kind", "effect"]).estimate
    assert framed.to_dict() == pytest.approx(stored.to_dict())
    same = drawn.set_index(["kind", "effect", "place"]).in_refuser.dropna()
    assert set(same.index.get_level_values("place")) == {"framed, together"} and same.tolist() == pytest.approx([1] * 4)


def test_shipped_rows_are_of_the_adapters_that_are_shipped() -> None:
    table, files = read_shipped("real_plants", or_empty=True), smollm2.refusers().values()
    known = {folder.name.removesuffix("-0"): hash_file(folder / "adapter_model.safetensors", {}) for folder in files}
    assert (table.kind.map(known) == table.adapter).all()


# ---- knock out ----


def test_a_loss_is_that_of_full_forward_passes_with_the_mean_in_place() -> None:
    organism = compiled.draw("skip_only", 700, topics=10, pairs_per_topic=1, dtype=torch.float64)
    pairs = [p for p in organism.pairs if p.pair.treatment in ("T2", "T2b") and not p.control.tail]
    site, layer = decider(organism.design)
    losses = truths.knock_out_losses(organism.program, pairs)
    asked = [getattr(p, side) for name, side in truths.SIGNS for p in pairs if p.pair.treatment == name]
    texts = [[{"role": "user", "content": " ".join(one.words())}] for one in asked]
    tokenizer, model = organism.subject.tokenizer, organism.subject.model
    ids = tokenizer.apply_chat_template(
        texts, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    comply, refuse = (tokenizer.convert_tokens_to_ids(list(side)) for side in compiled_language.outcomes()["T2"])

    def behaviour(edit=lambda out: out) -> float:
        logits = passed(model, ids, model.model.layers[layer].mlp, edit)[0].logits[:, -1]
        odds = logits[:, comply].logsumexp(-1) - logits[:, refuse].logsumexp(-1)
        means = odds.reshape(len(truths.SIGNS), -1).mean(1)
        return float(sum(sign * mean for sign, mean in zip(truths.SIGNS.values(), means, strict=True)))

    assert site == "mlp_out" and losses[site, layer] > 0.8
    knocked_out = behaviour(lambda out: out.mean(0, keepdim=True).expand_as(out))
    assert 1 - knocked_out / behaviour() == pytest.approx(losses[site, layer], abs=2e-3)


def test_the_behaviour_goes_where_the_builder_says_it_is_decided() -> None:
    """A copy is needed as the decision is, and what benign choices do no knock-out can see: there C1 is another question."""
    table = truths.agreement(read_shipped("knock_outs"))
    assert set(table.index) == set(truths.BUILT) and (table.models == len(truths.SEEDS)).all()
    assert (table.decides == table.models).all() and (table.models == table.C2).all()
    assert set(table.index[table.models > table.C1]) == {"late_like_benign", "skip_only"}
    again = truths.knock_outs(["middle"], truths.SEEDS[:1]).iloc[0]
    stored = read_shipped("knock_outs").set_index(["kind", "seed"]).loc["middle", truths.SEEDS[0]]
    assert again.decider == pytest.approx(stored.decider) and again.site == stored.site
