"""Helpers of notebook 05, against the library that they compose, on the shipped model."""

import pytest

from companion.base.display import NotDefined
from companion.mediation.estimands import measure_effects, mediators
from companion.mediation.study import Study
from helpers import model, tokens


def test_the_map_of_a_pair_has_its_effects_as_shares(study: Study) -> None:
    pair = model.example_pair(study)
    found = tokens.map_of_pair(study, pair).set_index(["site", "layer", "position"]).share
    last = len(pair.control) - 1
    for site in ("resid_post", "attn_out", "mlp_out"):
        effect = measure_effects(study.subject, [pair], study.openers, mediators(study.subject, [site]))
        share = ((effect.nie0 + effect.nie1) / 2 / effect.te).tolist()
        assert [found[site, layer, last] for layer in effect.layer] == pytest.approx(share, abs=1e-4)


def test_the_ways_of_one_pair_begin_with_its_whole_effect(study: Study) -> None:
    pair = model.example_pair(study)
    ways = tokens.path_effects_of_pair(study, pair, 4)
    whole = measure_effects(study.subject, [pair], study.openers, mediators(study.subject, ["resid_post"], layers=[4]))
    assert list(ways.index) == ["live", "attention held", "MLPs held", "both held"]
    assert ways["live"] == pytest.approx(whole.nie0.item(), abs=1e-4) and abs(ways["both held"] - ways["live"]) > 0.01


def test_an_answer_is_labelled_by_what_it_says_and_what_is_not_defined_says_why(study: Study) -> None:
    pair = tokens.tested_pairs(study, 1)[0]
    assert pair.pair.split == "test" and pair.pair.treatment == "T2"
    ids = {name: [*part[:1], *tokens.end_tokens(study.subject)][:2] for name, part in
           (("refusal", study.openers["T2"].refuse), ("other", study.openers["T2"].comply))}  # fmt: skip
    assert tokens.label(study, pair, ids["refusal"]) == "refusal" != tokens.label(study, pair, ids["other"])
    none = NotDefined("No jailbroken prompt (T2) in the test split.")
    assert tokens.rates(study, none) == (none, str(none))
