"""Mediation against models whose effects are known: a structural model and a compiled transformer."""

import handmade
import numpy as np
import pandas as pd
import pytest
from effect_tools import SITES, cell, of
from handmade import Program, compiled, cue_pairs

from companion.mediation.estimands import Mediator, difference, estimands, measure_effects, mediators
from companion.prompts.tokens import Openers

# ---- a structural model written by hand ----


@pytest.mark.parametrize(("direct", "carried", "read", "both"), [(0.5, 2, 1.5, 0), (-1, 0.5, -2, 3), (0, 1, 0, 4)])
def test_estimands_of_a_structural_model(direct: float, carried: float, read: float, both: float) -> None:
    def mediator(x: float) -> float:
        return 0.3 + carried * x

    def outcome(x: float, m: float) -> float:
        return 1.7 + direct * x + read * m + both * x * m

    cells = {f"y{x}{m}": [outcome(x, mediator(m))] for x in (0, 1) for m in (0, 1)}
    found = estimands(pd.DataFrame(cells)).iloc[0]
    assert found.te == pytest.approx(direct + carried * (read + both) + 0.3 * both)
    assert found.nie0 == pytest.approx(carried * read)
    assert found.nie1 == pytest.approx(carried * (read + both))
    assert found.nie1 - found.nie0 == pytest.approx(carried * both)  # the mediated interaction
    assert found.te - found.nie1 == pytest.approx(direct + 0.3 * both)  # NDE0
    assert found.te - found.nie0 == pytest.approx(direct + (carried + 0.3) * both)  # NDE1


# ---- a compiled transformer ----


WANTED = [
    Mediator(site, layer, "last", head)
    for site in (*SITES, *(f"{site}.direct" for site in SITES))
    for layer in range(handmade.N_LAYERS)
    for head in (range(handmade.N_HEADS) if site.startswith("head") else (-1,))
] + [Mediator(site, layer, group) for site in SITES[:3] for layer in range(4) for group in ("differ", "all")]


def expected(program: Program, mediator: Mediator) -> float:
    """The known effect of cue A alone: through head 1 of layer 1, and from there through layer 2's MLP and the skip path."""
    total = program.log_odds(1, 0) - program.log_odds(0, 0)
    gated = total - program.skip
    site, layer, is_copy = mediator.site, mediator.layer, mediator.head in (-1, 1)
    if mediator.position == "all":
        return {"resid_post": total, "attn_out": total * (layer == 1), "mlp_out": gated * (layer == 2)}[site]
    if mediator.position == "differ":
        return total * (site == "resid_post" and layer == 0)  # the head reads the cue at layer 1
    return {
        "resid_post": total * (layer >= 1),
        "attn_out": total * (layer == 1),
        "mlp_out": gated * (layer == 2),
        "head": total * (layer == 1 and is_copy),
        "resid_post.direct": {0: 0, 1: program.skip}.get(layer, total),
        "attn_out.direct": program.skip * (layer == 1),
        "mlp_out.direct": gated * (layer == 2),
        "head.direct": program.skip * (layer == 1 and is_copy),
    }[site]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("program", [Program(), Program(gain=-2, skip=0.7), Program(always=0, both=1, skip=1.5)])
def test_effects_of_a_compiled_model(program: Program, family: str) -> None:
    subject = compiled(program, family)
    pairs = cue_pairs(subject.tokenizer, "off low", "on low")
    openers = Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))
    table = measure_effects(subject, pairs, of(openers), WANTED)
    assert table.te.to_numpy() == pytest.approx(program.log_odds(1, 0) - program.log_odds(0, 0), abs=1e-4)
    known = np.tile([expected(program, mediator) for mediator in WANTED], len(pairs))
    np.testing.assert_allclose(table.nie0, known, atol=1e-4)
    np.testing.assert_allclose(table.nie1, known, atol=1e-4)
    assert np.abs(known).max() > 0.5


@pytest.mark.parametrize("program", [Program(always=0, both=1), Program(always=1, both=2, skip=0.5)])
def test_interaction_in_a_compiled_gate(program: Program) -> None:
    """Both cues change: each head alone, the MLP that multiplies what they bring, and the residual stream between."""
    subject = compiled(program)
    pairs = cue_pairs(subject.tokenizer, "off low", "on high")
    openers = Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))
    wanted = [
        Mediator("head", 1, head=1),
        Mediator("head", 0, head=0),
        Mediator("mlp_out", 2),
        Mediator("resid_post", 1),
    ]
    table = measure_effects(subject, pairs, of(openers), wanted)
    y = {(a, b): program.log_odds(a, b) for a in (0, 1) for b in (0, 1)}
    known = {"head 1": (y[1, 0], y[0, 1]), "head 0": (y[0, 1], y[1, 0]), "resid_post": (y[1, 1], y[0, 0])}
    known["mlp_out"] = (y[1, 1] - program.skip, y[0, 0] + program.skip)
    for (site, head), rows in table.groupby(["site", "head"]):
        y01, y10 = known[f"head {head}" if site == "head" else site]
        np.testing.assert_allclose(rows[["y00", "y01", "y10", "y11"]], [[y[0, 0], y01, y10, y[1, 1]]] * 3, atol=1e-4)
    interaction = (table.nie1 - table.nie0)[table["head"] == 1]
    assert interaction.to_numpy() == pytest.approx(y[1, 1] - y[0, 1] - y[1, 0] + y[0, 0], abs=1e-4)
    assert abs(interaction.iloc[0]) > 1


def test_the_twin_difference_keeps_what_only_harm_has() -> None:
    """Cue A off -> on is the wrapper, cue B the request: its effect on a harmful one beyond that on a harmless one."""
    program = Program(always=1, both=2, skip=0.5)
    subject = compiled(program)
    openers = Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))
    pairs = cue_pairs(subject.tokenizer, "off high", "on high")
    twins = cue_pairs(subject.tokenizer, "off low", "on low", treatment="T2b")
    wanted = mediators(subject, ["mlp_out", "attn_out", "attn_out.direct"])
    table = measure_effects(subject, [*twins[::-1], *pairs], of(openers, "T2", "T2b"), wanted)
    made = difference(table, {pair.pair.id: pair.pair.twin for pair in pairs})
    assert made.pair_id.nunique() == 3
    assert set(made.treatment) == {"T2-T2b"}
    known = program.log_odds(1, 1) - program.log_odds(0, 1) - program.log_odds(1, 0) + program.log_odds(0, 0)
    assert known > 2
    assert made.te.to_numpy() == pytest.approx(known, abs=1e-4)
    assert cell(made, "mlp_out", 2).nie0.to_numpy() == pytest.approx(known, abs=1e-4)
    assert cell(made, "attn_out", 1).nie1.to_numpy() == pytest.approx(known, abs=1e-4)
    assert cell(made, "attn_out.direct", 1).nie0.to_numpy() == pytest.approx(0, abs=1e-4)
    assert cell(table, "attn_out.direct", 1).nie0.to_numpy() == pytest.approx(0.5, abs=1e-4)
