"""C4's paths against compiled models in which the signal is known to go through MLPs, attention, or neither."""

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, tiny_subject, tokens
from handmade import BIAS, FIRST, OUT, SIZE, WORDS, Program, compiled, cue_pairs
from ledger_rows import FINE, Number, table

from companion.claims.registered_rules import rule_c4
from companion.claims.verdict import Rows, Verdict
from companion.evidence.tokens import evidence_c4
from companion.mediation import path_specific, summaries
from companion.mediation.study import Study
from companion.model import activations, replay
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.prompts.tokens import Openers

OPENERS = ("yes", "no")


def attention_carried() -> Subject:
    """After layer 1 the last token knows FIRST; at layer 2 attention reads it from its own token into OUT; no MLP works."""
    subject = compiled(Program(gain=0.0))
    attention = subject.model.model.layers[2].self_attn
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(attention, name).weight.zero_()
        # The key is FIRST itself, so that a token that knows it looks at tokens that know it: itself above all.
        attention.q_proj.weight[3, BIAS] = 10.0 / SIZE
        attention.k_proj.weight[3, FIRST] = 10.0
        attention.v_proj.weight[0, FIRST] = 1.0
        attention.o_proj.weight[OUT, 0] = 2.0
    return subject


def study_of(subject: Subject) -> Study:
    tokenizer = subject.tokenizer
    assert tokenizer is not None and set(OPENERS) <= set(WORDS)
    pairs = cue_pairs(tokenizer, "off low", "on low", n=6)
    yes, no = ((tokenizer.convert_tokens_to_ids(word),) for word in OPENERS)
    return Study("compiled", subject, tuple(pairs), {"T2": Openers(yes, no)}, {}, {})


def paths(subject: Subject, layer: int) -> dict[str, float]:
    table = summaries.averaged(path_specific.path_effects(study_of(subject), [layer]))
    found = table[table.outcome == "Y1"].groupby("site")["nie"].mean()
    return {
        name: float(sum(weight * found[held] for held, weight in path.items()) / found["live"])
        for name, path in path_specific.PATHS.items()
    }


def test_skip_only_is_exactly_zero_for_mlps_and_attention() -> None:
    found = paths(compiled(Program(gain=0.0, skip=1.5)), 1)
    assert found == {"MLPs": 0, "attention": 0, "skip": 1, "MLPs, attention live": 0}


def test_an_mlp_carried_signal_is_one() -> None:
    assert paths(compiled(Program()), 1) == pytest.approx(
        {"MLPs": 1, "attention": 0, "skip": 0, "MLPs, attention live": 1}, abs=1e-4
    )


@pytest.mark.parametrize("skip", [0.4, -0.7])
def test_what_skips_and_what_mlps_carry_are_shared_out_as_the_weights_say(skip: float) -> None:
    program = Program(skip=skip)
    total = program.log_odds(1, 0) - program.log_odds(0, 0)
    assert paths(compiled(program), 1)["MLPs"] == pytest.approx(1 - skip / total, abs=1e-4)


def test_an_attention_carried_signal_is_no_mlps() -> None:
    found = paths(attention_carried(), 1)
    assert abs(found["MLPs"]) < 1e-6
    assert found["attention"] == pytest.approx(1, abs=1e-4)


def test_mlps_cannot_carry_what_has_not_arrived() -> None:
    """Below the layer whose attention brings the signal, the last token's residual stream is the same in both runs."""
    table = path_specific.path_effects(study_of(compiled(Program())), [0])
    assert (table[["nie0", "nie1"]] == 0).all().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mlp_carries_anything_from_an_earlier_token(family: str) -> None:
    """Attention outputs of the last token held, every other token changed: the last one stays what it was, bit for bit."""
    subject = tiny_subject(family)
    base, source = (activations.clean_run(subject, tokens(seed=seed)) for seed in (1, 2))
    last = torch.zeros_like(base.tokens, dtype=torch.bool)
    last[:, -1] = True
    for layer in range(subject.n_layers - 1):
        earlier = Patch("resid_post", layer, ~last)
        above = range(layer + 1, subject.n_layers)
        held = [Patch("attn_out", at, last, value=base.site("attn_out", at)) for at in above]
        live, frozen = replay.interchange(subject, base, source, [earlier, (earlier, *held)])[:, :, 0].unbind(1)
        assert torch.equal(frozen, base.resid_post[-1][:, -1])
        assert ((live - frozen).abs().amax(-1) > 1e-3).all(), "attention must have had something to bring"


def synthetic(share: float, layer_of_takeover: int, n_layers: int = 4) -> pd.DataFrame:
    """Effects of 60 pairs of 30 topics in which MLPs carry a planted share from every layer on."""
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        te = 4 + rng.normal(0, 0.3)
        for layer in range(n_layers):
            is_last = layer == n_layers - 1
            live = te * (1.0 if is_last else 0.8 if layer >= layer_of_takeover else 0.2)
            above = live if is_last else (1 - share) * live
            held = {
                "live": live,
                "attention held": live,
                "MLPs held": above,
                "both held": above,
                "all held": 0.2 * live,
            }
            for site, effect in held.items():
                topic, split = f"t{i % 30}", "discover" if i % 30 < 15 else "test"
                key = (f"p{i}", topic, "T2", split, site, layer, "last", -1)
                rows += [(*key, outcome, 0.0, effect, te - effect, te) for outcome in path_specific.OUTCOMES]
    names = ["pair_id", "topic", "treatment", "split", "site", "layer", "position", "head", "outcome"]
    made = pd.DataFrame(rows, columns=[*names, "y00", "y01", "y10", "y11"])
    return made.assign(te=made.y11 - made.y00, nie0=made.y01 - made.y00, nie1=made.y11 - made.y10)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_layers_own_mlp_counts_from_it_on(layer: int) -> None:
    rows = pd.DataFrame(evidence_c4(synthetic(0.7, layer), "m", 4)).set_index(["quantity", "variant"])
    assert rows.loc[("share of MLPs from this layer on", "main"), "estimate"] == pytest.approx(0.8)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_planted_take_over_and_share_are_found(layer: int) -> None:
    rows = pd.DataFrame(evidence_c4(synthetic(0.7, layer), "m", 4)).set_index(["quantity", "variant"])
    assert rows.loc[("hand-over layer", "main"), ["estimate", "ci_low", "ci_high"]].tolist() == [layer] * 3
    assert rows.loc[("share of MLPs", "main"), "estimate"] == pytest.approx(0.7)
    assert rows.loc[("share of skip", "main"), "estimate"] == pytest.approx(0.3)


def test_a_take_over_in_the_last_layer_is_not_defined() -> None:
    rows = pd.DataFrame(evidence_c4(synthetic(0.7, 3), "m", 4))
    assert "no block is left above" in rows.loc[rows.quantity == "not defined", "note"].item()
    assert "main" not in set(rows.loc[rows.quantity == "share of MLPs", "variant"])


@pytest.mark.parametrize(("layer", "above", "own"), [(1, 1, 1), (2, 0, 1), (3, 0, 0)])
def test_the_mlp_that_decides_counts_from_its_own_layer_on(layer: int, above: float, own: float) -> None:
    """Layer 2's MLP decides: from layer 2 on nothing is left to the MLPs above, and all to it and them together."""
    table = summaries.averaged(path_specific.path_effects(study_of(compiled(Program())), [layer]))
    found = table[table.outcome == "Y1"].groupby("site")["nie"].mean()
    assert (found["attention held"] - found["both held"]) / found["live"] == pytest.approx(above, abs=1e-4)
    assert (found["attention held"] - found["all held"]) / found["live"] == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_held_the_last_residual_is_a_sum(family: str) -> None:
    """What the source's residual stream has after a layer without its MLP's output, plus all that is held."""
    subject = tiny_subject(family)
    base, source = (activations.clean_run(subject, tokens(seed=seed)) for seed in (1, 2))
    for layer in range(subject.n_layers):
        patches = path_specific.variants(subject, base, source, [layer])
        held = replay.interchange(subject, base, source, [patches[list(path_specific.HELD).index("all held")]])[:, 0, 0]
        expected = source.resid_post[layer] - source.site("mlp_out", layer) + base.site("mlp_out", layer)
        for at in range(layer + 1, subject.n_layers):
            expected = expected + base.site("attn_out", at) + base.site("mlp_out", at)
        assert (held - expected[:, -1]).abs().max() < 1e-4 * expected[:, -1].abs().max()


SHARE = "share of MLPs"
FINE_C4: dict[tuple[str, str, str], Number] = {
    **{key: FINE[key] for key in FINE if key[0] == "gate"},
    **{("C4", SHARE, name): (0.8, 0.7, 0.9) for name in ("main", "norm frozen", "unsaturated")},
    ("C4", "hand-over layer", "main"): (3, 3, 4),
}


def judged(changes: dict | None = None, n_topics: int = 36) -> Verdict:
    return rule_c4(Rows("m", table({**FINE_C4, **(changes or {})}, n_topics=n_topics)))


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [((0.8, 0.6, 0.9), "supported"), ((0.8, 0.59, 0.9), "inconclusive"), ((0.3, 0.2, 0.4), "contradicted"),
     ((0.3, 0.2, 0.41), "inconclusive")],
)  # fmt: skip
def test_c4_thresholds(numbers: Number, verdict: str) -> None:
    low = {("C4", SHARE, name): numbers for name in ("norm frozen", "unsaturated")}
    assert judged({("C4", SHARE, "main"): numbers, **low}).verdict == verdict


@pytest.mark.parametrize("variant", ["norm frozen", "unsaturated"])
@pytest.mark.parametrize(("numbers", "state"), [((0.4, 0.3, 0.5), "failed"), (None, "not run")])
def test_c4_controls_cap(variant: str, numbers: Number | None, state: str) -> None:
    made = judged({("C4", SHARE, variant): numbers})
    assert made.verdict == "inconclusive" and state in (made.controls or {}).values()


def test_c4_without_its_evidence() -> None:
    assert judged(dict.fromkeys([key for key in FINE_C4 if key[0] == "C4"])).verdict == "not testable"
    assert judged({("gate", "TE T2-T2b", "main"): (0.2, 0.1, 0.3)}).verdict == "inconclusive"
    assert judged(n_topics=12).verdict == "inconclusive"
    assert judged({("gate", "joint probability T2", "main"): (0.5, 0.4, 0.6)}).verdict == "inconclusive"
