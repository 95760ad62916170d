"""The steps of notebook 03, on the shipped model."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.mediation.study import Study
from helpers import model, modules


@pytest.fixture(scope="module")
def study() -> Study:
    whole = model.begin("embedded", "embedded", "made", pairs=12)
    return replace(whole, pairs=tuple(whole.of("T2", "T2b")))


@pytest.fixture(scope="module")
def effects(study: Study, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "RESULTS", tmp_path_factory.mktemp("results"))
        made = modules.measure_modules(study)
        assert (paths.RESULTS / "made" / "03_modules.parquet").is_file()
    return made


def test_direct_effects_add_up_to_one_and_each_head_is_part_of_its_layer(study: Study, effects: pd.DataFrame) -> None:
    shown = modules.passing_and_writing(effects.assign(site=effects.site.str.replace(".direct", "")), effects)
    assert shown[shown.effect == "direct"].estimate.sum() == pytest.approx(1, abs=1e-3)
    linear = effects[(effects.outcome == "contrast.frozen") & (effects.treatment == "T2")]
    of = {
        site: linear[linear.site == f"{site}.direct"].groupby(["pair_id", "layer"]).nie0.sum()
        for site in ("head", "attn_out")
    }
    assert np.allclose(of["head"], of["attn_out"], atol=1e-3)


def test_carrying_heads_are_chosen_on_discover_and_framed(effects: pd.DataFrame) -> None:
    heads = modules.carrying_heads(effects)
    on_test = effects.split == "test"
    turned = effects.assign(**{name: effects[name].where(~on_test, -effects[name]) for name in ("nie0", "nie1")})
    assert modules.carrying_heads(turned) == heads and len(heads) == 3
    shown = modules.head_effects(effects)
    framed = shown[shown.carries & (shown.effect == "indirect")]
    assert {*zip(framed.layer, framed["head"], strict=True)} == {*heads}


def test_enough_and_needed_are_sums_over_layers(effects: pd.DataFrame) -> None:
    totals = effects[effects.site.str.endswith("_out.direct")].assign(site=lambda t: t.site.str.removesuffix(".direct"))
    found = modules.enough_or_needed(totals).estimate
    test = modules.signed_contrast(totals)
    for site in ("attn_out", "mlp_out"):
        own = test[test.site == site].groupby("pair_id")[["nie0", "nie1"]].sum().mean()
        assert found[site, "enough (NIE0)"] == pytest.approx(own.nie0)
        assert found[site, "NIE1 - NIE0"] == pytest.approx(own.nie1 - own.nie0)


def test_attention_rows_add_up_to_one_whether_by_token_or_by_group(study: Study) -> None:
    pair, heads = model.example_pair(study), [(3, 1), (5, 0)]
    shown = modules.attention_of_heads(study, pair, heads)
    sums = shown.groupby(["panel", "head"]).weight.sum()
    assert len(sums) == 4 and np.allclose(sums, 1, atol=1e-4)
    first = shown[(shown.panel == "treated prompt") & (shown["head"] == "3.1")]
    _, treated = model.token_ids(study, pair)
    with torch.no_grad(), modules.eager_attention(study.subject):
        row = study.subject.model(treated, output_attentions=True).attentions[3][0, 1, -1]
    assert first.weight.tolist()[1:] == pytest.approx(row[-len(first) + 1 :].tolist())
    by_group = modules.attention_by_group(study, [pair], heads)
    assert np.allclose(by_group.sum(), 1, atol=1e-4)
    wrapper = first[first.token.isin(["·flag"])].weight.sum()
    assert by_group.loc["wrapper", ("3.1", "treated")] >= wrapper > 0.5


def test_shares_that_are_drawn_come_raw_first_and_none_is_drawn_without_a_wrapper() -> None:
    missing = NotDefined("no wrapper")
    assert modules.normalised(missing) is missing
    evidence = pd.DataFrame({"quantity": ["MLP share of NIE"] * 3, "variant": ["per parameter", "norm frozen", "main"]})
    drawn = modules.normalised(evidence.assign(ci_low=0.1, ci_high=0.9))
    assert drawn.normalisation.tolist() == ["raw", "per parameter"] and set(drawn.effect) == {"indirect effects"}
