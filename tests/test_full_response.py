"""Y2 against one hooked forward pass a pair and cell over the prompt with its answer behind it, unpadded."""

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_subject
from handmade import Program, compiled, cue_pairs, random_pairs
from torch import Tensor, nn

from companion.mediation import estimands, outcomes, sweeps
from companion.mediation.estimands import Mediator, mediators
from companion.model.architecture import Subject
from companion.prompts import positions
from companion.prompts.tokens import Openers, TokenPair

OPENERS = {"T2": Openers((10, 12, 13), (20, 21)), "T2b": Openers((30,), (40, 41))}
CELLS = {"y00": (0, 0), "y01": (0, 1), "y10": (1, 0), "y11": (1, 1)}


def subject_for(family: str, pairs: list[TokenPair], *, ends: bool = False) -> Subject:
    """A random model; with `ends`, two tokens that it would say are made its end tokens, so that texts differ in length."""
    subject = tiny_subject(family)
    subject.model.generation_config.eos_token_id = None
    if ends:
        said = [texts(subject, pairs[0])[0][5], texts(subject, pairs[-1])[1][9]]
        subject.model.generation_config.eos_token_id = [int(token) for token in said]
    return subject


def texts(subject: Subject, pair: TokenPair) -> tuple[Tensor, Tensor]:
    """Answer and refusal of one pair, without padding."""
    control, treated = (torch.tensor(getattr(pair, side))[None] for side in ("control", "treated"))
    made = outcomes.continuations(subject, control, treated, OPENERS[pair.pair.treatment])
    return made.answer[made.answer_mask], made.refusal[made.refusal_mask]


def log_p(
    subject: Subject, pair: TokenPair, text: Tensor, cell: tuple[int, int], module: nn.Module, where: Tensor
) -> float:
    """The library's own loss over one text, with a module's output at prompt positions taken from the other prompt."""
    prompts = [torch.cat([torch.tensor(ids), text])[None] for ids in (pair.control, pair.treated)]
    labels = prompts[cell[0]].clone()
    labels[:, : len(pair.control)] = -100
    seen: list[Tensor] = []

    def swap(_: nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        own = output[0] if isinstance(output, tuple) else output
        if not seen:
            seen.append(own)
            return None
        mixed = own.clone()
        mixed[:, where] = seen[0][:, where]
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = module.register_forward_hook(swap)
    try:
        subject.model(prompts[cell[1]])
        loss = subject.model(prompts[cell[0]], labels=labels).loss.item()
    finally:
        handle.remove()
    return -loss * len(text)


def module(subject: Subject, mediator: Mediator) -> nn.Module:
    block = subject.model.model.layers[mediator.layer]
    return {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[mediator.site]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("ends", [False, True])
def test_cells_against_hooked_forward_passes(family: str, ends: bool) -> None:
    pairs = random_pairs(2, 8, 61) + random_pairs(3, 9, 61, seed=1, treatment="T2b")
    for i, pair in enumerate(pairs):
        object.__setattr__(pair.pair, "id", f"pair {i}")
    subject = subject_for(family, pairs, ends=ends)
    wanted = [
        Mediator("attn_out", 2),
        Mediator("resid_post", 1, "rest"),
        Mediator("mlp_out", 0, "all"),
        Mediator("mlp_out", 3),
    ]
    table = sweeps.whole_answer_effects(subject, pairs[::-1], OPENERS, wanted)
    assert len(table) == len(pairs) * len(wanted)
    assert set(table.outcome) == {"Y2"}
    lengths = set()
    for pair in pairs:
        answer, refusal = texts(subject, pair)
        lengths |= {len(answer), len(refusal)}
        rows = table[table.pair_id == pair.pair.id].set_index(["site", "layer", "position"])
        for mediator in wanted:
            where = torch.tensor(positions.groups(pair, "")[mediator.position]).nonzero().flatten()
            for name, cell in CELLS.items():
                brute = [
                    log_p(subject, pair, text, cell, module(subject, mediator), where) for text in (answer, refusal)
                ]
                found = rows.loc[(mediator.site, mediator.layer, mediator.position), name]
                assert found == pytest.approx(brute[0] - brute[1], abs=2e-4)
    assert len(lengths) > 2 if ends else lengths == {24}
    assert (table[["nie0", "nie1"]].abs() > 1e-2).any(axis=None)


def test_what_follows_the_end_token_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(4, 8, 61)
    subject = subject_for("llama", pairs, ends=True)
    wanted = mediators(subject, ["attn_out"])
    table = sweeps.whole_answer_effects(subject, pairs, OPENERS, wanted)
    plain = outcomes.continuations

    def other_padding(*args: object) -> outcomes.Continuations:
        made = plain(*args)
        assert not made.answer_mask.all()
        answer, refusal = made.answer.clone(), made.refusal.clone()
        answer[~made.answer_mask], refusal[~made.refusal_mask] = 7, 9
        return outcomes.Continuations(answer, made.answer_mask, refusal, made.refusal_mask)

    monkeypatch.setattr(outcomes, "continuations", other_padding)
    again = sweeps.whole_answer_effects(subject, pairs, OPENERS, wanted)
    cells = ["y00", "y01", "y10", "y11"]
    np.testing.assert_allclose(table[cells], again[cells], atol=1e-5)


def test_all_prompt_cells_carry_the_whole_effect_at_every_layer() -> None:
    """The answer's own tokens are the same in both runs, so all that differs between them lies in the prompt's cells."""
    pairs = random_pairs(3, 8, 61)
    subject = subject_for("qwen2", pairs)
    table = sweeps.whole_answer_effects(
        subject, pairs, OPENERS, [Mediator("resid_post", layer, "all") for layer in range(4)]
    )
    size = table.te.abs().max()
    assert size > 0.1
    first = table[table.layer == 0]
    np.testing.assert_allclose(first[["nie0", "nie1"]], first[["te", "te"]], atol=1e-4 * size)
    # At the last layer the first answer token is read at a prompt cell, the others are not.
    last = table[table.layer == 3]
    assert ((last.nie0 - last.te).abs() > 1e-3 * size).any()


def test_the_first_token_alone_is_y1_of_the_two_openers(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(4, 8, 61, treatment="T2b")
    subject = subject_for("llama", pairs)
    wanted = mediators(subject, ["mlp_out"])
    openers = {"T2b": Openers((30,), (40,))}
    monkeypatch.setattr(outcomes, "continuations", lambda *args: _openers_only(*args))
    cells = ["y00", "y01", "y10", "y11", "te", "nie0", "nie1"]
    whole = sweeps.whole_answer_effects(subject, pairs, openers, wanted)
    first = estimands.measure_effects(subject, pairs, openers, wanted)
    np.testing.assert_allclose(whole[cells], first[cells], atol=1e-4)


def _openers_only(subject: Subject, control: Tensor, treated: Tensor, openers: Openers) -> outcomes.Continuations:
    answer, refusal = (torch.full((len(control), 1), camp[0]) for camp in (openers.comply, openers.refuse))
    return outcomes.Continuations(answer, torch.ones_like(answer) > 0, refusal, torch.ones_like(refusal) > 0)


def test_a_second_run_gives_the_same_bytes() -> None:
    pairs = random_pairs(3, 8, 61)
    subject = subject_for("qwen2", pairs, ends=True)
    wanted = mediators(subject, ["attn_out", "mlp_out"], ["last", "differ"])
    first, second = (sweeps.whole_answer_effects(subject, pairs, OPENERS, wanted) for _ in range(2))
    assert first.equals(second)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_a_compiled_answer() -> None:
    """Y2 of a model whose second answer token is decided by nothing in the prompt: the effects are those of the opener."""
    program = Program(skip=0.7)
    subject = compiled(program)
    yes, no = subject.tokenizer.convert_tokens_to_ids(["yes", "no"])
    subject.model.generation_config.eos_token_id = None
    pairs = cue_pairs(subject.tokenizer, "off low", "on low")
    table = sweeps.whole_answer_effects(
        subject, pairs, {"T2": Openers((yes,), (no,))}, mediators(subject, ["attn_out", "mlp_out"])
    )
    assert table.te.abs().min() > 1
    by_cell = table.groupby(["site", "layer"])[["nie0", "nie1"]].mean().abs().max(axis=1)
    assert set(by_cell[by_cell > 1e-3].index) == {("attn_out", 1), ("mlp_out", 2)}
