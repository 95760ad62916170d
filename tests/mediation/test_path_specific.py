"""C4's paths against compiled models in which the signal is known to go through MLPs, attention, or neither."""

import pytest
import torch
from effect_tools import said
from families import FAMILIES, tiny_subject, tokens
from handmade import BIAS, FIRST, OUT, SIZE, Program, compiled, cue_pairs

from companion.mediation import path_specific, summaries
from companion.mediation.study import Study
from companion.model import activations, replay
from companion.model.architecture import Subject
from companion.model.interventions import Patch


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


def shares(subject: Subject, layer: int) -> dict[str, float]:
    """Each path's share of the effect of the last token's residual stream after a layer, cue A changed."""
    pairs = cue_pairs(subject.tokenizer, "off low", "on low", n=6)
    study = Study("compiled", subject, tuple(pairs), {"T2": said(subject)}, {}, {})
    table = summaries.averaged(path_specific.path_effects(study, [layer]))
    found = table[table.outcome == "Y1"].groupby("site")["nie"].mean()
    weights = path_specific.PATHS | path_specific.WITH_OWN
    sums = {name: float(sum(w * found[held] for held, w in path.items())) for name, path in weights.items()}
    return {name: value / found["live"] if found["live"] else value for name, value in sums.items()}


SHARES = ("MLPs", "attention", "skip", "MLPs, attention live", "MLPs from this layer on")
PROGRAM, HALF = Program(), Program(skip=0.4)
SKIPPED = HALF.skip / (HALF.log_odds(1, 0) - HALF.log_odds(0, 0))


@pytest.mark.parametrize(
    ("program", "layer", "known"),
    [
        (Program(gain=0.0, skip=1.5), 1, (0, 0, 1, 0, 0)),  # nothing but the skip path
        (PROGRAM, 0, (0, 0, 0, 0, 0)),  # the signal has not arrived at the last token: no effect at all
        (PROGRAM, 1, (1, 0, 0, 1, 1)),  # layer 2's MLP carries everything
        (PROGRAM, 2, (0, 0, 1, 0, 1)),  # it has decided: nothing is left to the MLPs above, all to it and them together
        (PROGRAM, 3, (0, 0, 1, 0, 0)),
        (HALF, 1, (1 - SKIPPED, 0, SKIPPED, 1 - SKIPPED, 1 - SKIPPED)),
    ],
)
def test_shares_of_compiled_models(program: Program, layer: int, known: tuple[float, ...]) -> None:
    found = shares(compiled(program), layer)
    assert found == pytest.approx(dict(zip(SHARES, known, strict=True)), abs=1e-4)
    assert (known != (0, 0, 1, 0, 0) or layer == 3) or (found["MLPs"], found["attention"]) == (0, 0)  # exactly


def test_an_attention_carried_signal_is_no_mlps() -> None:
    found = shares(attention_carried(), 1)
    assert abs(found["MLPs"]) < 1e-6 and found["attention"] == pytest.approx(1, abs=1e-4)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_held_the_last_residual_is_a_sum(family: str) -> None:
    """What the source's residual stream has after a layer without its MLP's output, plus all that is held."""
    subject = tiny_subject(family)
    base, source = (activations.clean_run(subject, tokens(seed=seed)) for seed in (1, 2))
    for layer in range(subject.n_layers):
        patches = path_specific.held_patches(subject, base, source, [layer])
        held = replay.interchange(subject, base, source, [patches[list(path_specific.HELD).index("all held")]])[:, 0, 0]
        expected = source.resid_post[layer] - source.site("mlp_out", layer) + base.site("mlp_out", layer)
        for at in range(layer + 1, subject.n_layers):
            expected = expected + base.site("attn_out", at) + base.site("mlp_out", at)
        assert (held - expected[:, -1]).abs().max() < 1e-4 * expected[:, -1].abs().max()
