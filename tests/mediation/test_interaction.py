"""Where wrapper and request become more than their sum: against compiled models, one forward a change, and copies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from true_float64 import true_float64

from companion.calibration.localise import decider
from companion.evidence import layers
from companion.mediation import interaction, summaries
from companion.model import activations, interventions
from companion.model.activations import on_output
from organisms import compiled

KINDS = ("early", "middle", "late", "skip_only", "attention", "early_carrier")


@pytest.mark.parametrize("kind", KINDS)
def test_the_component_that_decides_is_found_and_copies_are_not(kind: str) -> None:
    organism = compiled.draw(kind, 5, topics=20, pairs_per_topic=1)
    table = summaries.signed(interaction.interaction_effects(compiled.study(organism)))
    share = table.groupby(["site", "layer"]).nie.mean() / table.te.mean()
    assert share.idxmax() == decider(organism)
    side = organism.design.side
    making = {decider(organism), ("mlp_out", side.layer)} if side else {decider(organism)}
    assert share.drop(list(making)).abs().max() < 0.02
    assert share[list(making)].sum() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_component_that_reads_its_own_input_writes_its_own_output(family: str) -> None:
    subject = tiny_subject(family, torch.float64)
    with true_float64(subject.model):
        run = activations.clean_run(subject, tokens(seed=1))
        for site in ("attn_out", "mlp_out"):
            hidden = run.resid_pre[2] + (run.attn_out[2] if site == "mlp_out" else 0)
            written = interventions.component_output(subject, run, site, 2, hidden)
            assert torch.allclose(written, run.site(site, 2), atol=1e-10), site


def test_it_is_one_full_forward_with_what_is_computed_taken_away() -> None:
    organism = compiled.draw("late", 3, topics=10, pairs_per_topic=1, dtype=torch.float64)
    this = compiled.study(organism)
    table, (pair, twin) = interaction.interaction_effects(this), this.with_twins(this.of("T2"))[0]
    subject, openers = this.subject, this.openers["T2"]
    runs = {name: activations.clean_run(subject, torch.tensor(ids[None])) for name, ids in
            {"00": twin.control, "01": twin.treated, "10": pair.control, "11": pair.treated}.items()}  # fmt: skip
    site, layer = decider(organism)
    extra = interaction.interaction_output(subject, runs, site, layer)

    def odds(*, less: bool) -> float:
        with torch.no_grad(), on_output(subject.layers[layer].mlp_write, lambda out: out - extra if less else None):
            logits = subject.model(torch.tensor(pair.treated[None])).logits[0, -1]
        return float(logits[list(openers.comply)].logsumexp(0) - logits[list(openers.refuse)].logsumexp(0))

    own = table[(table.pair_id == pair.pair.id) & (table.site == site) & (table.layer == layer)]
    assert own.nie1.item() == pytest.approx(odds(less=False) - odds(less=True), abs=1e-9)
    assert own.nie1.item() > 1


def test_a_linear_component_computes_nothing() -> None:
    organism = compiled.draw("late", 3, topics=10, pairs_per_topic=1)
    this = compiled.study(organism)
    site, layer = decider(organism)
    with torch.no_grad():
        this.subject.model.model.layers[layer].mlp.down_proj.weight.zero_()
    table = interaction.interaction_effects(this)
    assert table[(table.site == site) & (table.layer == layer)][["nie0", "nie1"]].abs().max().max() == 0


def test_twins_of_another_length_are_left_out_and_none_give_no_rows() -> None:
    organism = compiled.draw("late", 3, topics=10, pairs_per_topic=1)
    this = compiled.study(organism)
    pair, twin = this.with_twins(this.of("T2"))[0]
    longer = replace(twin, control=np.append(twin.control, 0), treated=np.append(twin.treated, 0))
    changed = replace(this, pairs=tuple(longer if one is twin else one for one in this.pairs))
    kept = [one for one, _ in changed.with_twins(changed.of("T2"))]
    assert pair not in kept and len(kept) == len(this.of("T2")) - 1
    table = interaction.interaction_effects(replace(this, twins={}))
    assert table.empty and layers.evidence_c1_computed(table, "m", 6) == []
