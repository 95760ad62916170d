"""The attacker: no disguise changes what is asked, and a search against many finds for each what it would alone."""

import numpy as np
import pytest

from companion.generation.hooks import Edit, Steering
from companion.generation.labels import is_harmful
from companion.mediation import study
from companion.steering import attacker
from companion.steering.attacker import STRONG, Disguise
from companion.steering.experiment import open_experiment
from companion.steering.methods import EMBEDDED_SENTENCE, constant


def test_no_disguise_changes_what_is_asked() -> None:
    asked = attacker.draw_requests("validate", 4)
    assert asked == attacker.draw_requests("validate", 4)
    for disguise in (STRONG, Disguise(attacker.all_wrappers()[-1], "clerk", None, "now")):
        texts = attacker.disguised(asked, [disguise]).text
        assert all(is_harmful(text) and disguise.wrapper.text in text for text in texts)
    topics = {split: {one.clause.topic for one in attacker.draw_requests(split)} for split in ("validate", "test")}
    assert not topics["validate"] & topics["test"]


def test_a_search_against_many_finds_for_each_what_it_would_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    this = open_experiment(study.begin("embedded", "embedded", "m", pairs=10), "embedded", thin=2)
    monkeypatch.setattr(attacker, "REQUESTS", 2)
    some = attacker.all_wrappers()[::20]
    monkeypatch.setattr(attacker, "all_wrappers", lambda: some)
    vector = constant(np.random.default_rng(0).standard_normal(this.subject.d_model))
    push = Steering("push", (Edit(3, "resid_post", vector, blind=True),), strength=20.0)
    methods = [Steering("plain"), push, Steering("told", system=EMBEDDED_SENTENCE)]
    alone = [attacker.worst_disguises(this, [one])[0] for one in methods]
    assert attacker.worst_disguises(this, methods) == alone
    assert len(set(alone)) > 1, "the methods must differ for this to say anything"
