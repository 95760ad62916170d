"""Cells, effects and outcomes: a compiled transformer, plain forward passes, the library's own losses and generation."""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from models import VOCAB, Program, compiled, cue_pairs, random_pairs, tiny_model, tiny_subject, tokens
from oracles import CELLS, SITES, YES_NO, log_odds, refusals_against_rest, said, swapped, true_float64
from torch import Tensor

from companion.generation import decode
from companion.mediation import estimands, outcomes
from companion.mediation.estimands import Mediator, measure_effects, mediators, with_difference, with_estimands
from companion.model import activations, memory, readout
from companion.model.architecture import Subject
from companion.model.load import from_model
from companion.prompts import positions
from companion.prompts.tokens import Openers, TokenPair

# ---- estimands ----


def plain_runs(subject: Subject, pairs: list[TokenPair]) -> tuple[Tensor, Tensor]:
    """Plain logits of control and treated at the last token."""
    return tuple(subject.model(ids).logits[:, -1].detach() for ids in estimands.prompt_tokens(subject, pairs))


def expected(program: Program, mediator: Mediator) -> float:
    """The known effect of cue A alone: through head 1 of layer 1, and from there through layer 2's MLP and the skip path."""
    total = program.log_odds(1, 0) - program.log_odds(0, 0)
    gated = total - program.skip
    site, layer, is_copy = mediator.site, mediator.layer, mediator.head in (-1, 1)
    if mediator.position == "differ":
        return total * (site == "resid_post" and layer == 0)  # the head reads the cue at layer 1
    return {
        "resid_post": total * (layer >= 1 or mediator.position == "all"), "attn_out": total * (layer == 1),
        "mlp_out": gated * (layer == 2), "head": total * (layer == 1 and is_copy),
        "resid_post.direct": {0: 0, 1: program.skip}.get(layer, total), "attn_out.direct": program.skip * (layer == 1),
        "mlp_out.direct": gated * (layer == 2), "head.direct": program.skip * (layer == 1 and is_copy),
    }[site]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("program", [Program(), Program(gain=-2, skip=0.7), Program(always=0, both=1, skip=1.5)])
def test_effects_of_a_compiled_model(program: Program, family: str) -> None:
    subject = compiled(program, family)
    pairs = cue_pairs(subject.tokenizer, "off low", "on low")
    wanted = mediators(subject, [*SITES, *(f"{site}.direct" for site in SITES)])
    wanted += mediators(subject, SITES[:3], ["differ", "all"])
    empty = [Mediator("resid_post", 1, "wrapper"), Mediator("attn_out.direct", 1, "wrapper")]
    assert len(set(wanted)) == len(wanted) == 2 * (3 * 4 + 4 * 2) + 3 * 4 * 2  # every layer, head and group
    table = measure_effects(subject, pairs, {"T2": said(subject)}, [*wanted, *empty])
    assert table.te.to_numpy() == pytest.approx(program.log_odds(1, 0) - program.log_odds(0, 0), abs=1e-4)
    known = np.tile([expected(program, mediator) for mediator in wanted] + [0, 0], len(pairs))
    np.testing.assert_allclose(table[["nie0", "nie1"]], np.stack([known, known], axis=1), atol=1e-4)
    assert np.abs(known).max() > 0.5


def test_a_difference_needs_the_twin_and_the_same_cell_and_has_the_smaller_joint_probability() -> None:
    rows = [("a", "T2", 0, 5.0, 0.8), ("a", "T2", 1, 6.0, 0.7), ("b", "T2", 0, 7.0, 0.9), ("c", "T2", 0, 8.0, 0.9),
            ("x", "T2b", 1, 2.5, 0.6), ("x", "T2b", 0, 1.0, 0.9)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["pair_id", "treatment", "layer", "y11", "joint"])
    table = with_estimands(table.assign(y00=1.0, y01=2.0, y10=3.0, site="mlp_out", topic="t", split="test"))
    made = with_difference(table, {"a": "x", "b": "gone"}).iloc[len(table) :]
    found = made[["pair_id", "layer", "y11", "te", "joint"]].values.tolist()
    assert found == [["a", 0, 4.0, 4.0, 0.8], ["a", 1, 3.5, 3.5, 0.6]]
    assert (made[["y00", "y01", "y10", "nie0"]] == 0).all(axis=None)
    of_sets = pd.concat([table.assign(set="first"), table.assign(set="second", y11=99.0)], ignore_index=True)
    apart = with_difference(of_sets, {"a": "x"}).iloc[len(of_sets) :]
    assert apart.y11.tolist() == [4.0, 3.5, 0.0, 0.0]  # each set minus its own twin row
    assert with_difference(table, {}) is table


PLAIN = [("resid_post", 1, "rest"), ("attn_out", 2), ("mlp_out", 0, "differ"), ("mlp_out", 3)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("mediator", [Mediator(*one) for one in PLAIN], ids=str)
def test_cells_of_a_plain_forward_pass(family: str, mediator: Mediator) -> None:
    subject, pairs = tiny_subject(family), random_pairs(4, 9, 61)
    ids, where = estimands.prompt_tokens(subject, pairs), torch.tensor(positions.stack(pairs, "", mediator.position))
    table = measure_effects(subject, pairs, {"T2": YES_NO}, [mediator])
    for name, base, source in (("y01", 0, 1), ("y10", 1, 0)):
        logits = swapped(subject, mediator, ids[base], ids[source], where).logits[:, -1]
        np.testing.assert_allclose(table[name], log_odds(logits), atol=1e-4)
    clean = torch.stack(plain_runs(subject, pairs), dim=1)
    np.testing.assert_allclose(table[["y00", "y11"]], log_odds(clean), atol=1e-4)
    assert (table.nie0.abs() > 1e-3).any()


def test_frozen_outcomes_by_hand() -> None:
    subject, pairs = tiny_subject("llama"), random_pairs(4, 9, 61)
    batch, wanted = estimands.run_clean(subject, pairs), [Mediator("mlp_out", 2)]
    y01, y10 = estimands.final_residuals(subject, batch, wanted)
    control, treated = (run.resid_post[-1][:, -1] for run in (batch.control, batch.treated))
    norm, unembed = subject.model.model.norm, subject.model.lm_head.weight
    scale = torch.rsqrt(control.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    table = measure_effects(subject, pairs, {"T2": YES_NO}, wanted, ("Y1.frozen", "contrast.frozen"))
    table = table.set_index(["outcome", "pair_id"])
    own = [logits.softmax(-1) for logits in plain_runs(subject, pairs)]
    camps = [list(camp) for camp in (YES_NO.comply, YES_NO.refuse)]
    comply, refuse = (sum(p[:, camp] / p[:, camp].sum(-1, keepdim=True) for p in own) / 2 for camp in camps)
    for name, resid in {"y00": control, "y01": y01[:, 0], "y10": y10[:, 0], "y11": treated}.items():
        logits = ((resid * scale * norm.weight) @ unembed.T).detach()
        np.testing.assert_allclose(table.loc["Y1.frozen", name], log_odds(logits), atol=1e-4)
        linear = (logits[:, camps[0]] * comply).sum(-1) - (logits[:, camps[1]] * refuse).sum(-1)
        np.testing.assert_allclose(table.loc["contrast.frozen", name], linear, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_direct_effects_add_up_to_the_contrasts_total_effect(family: str) -> None:
    subject, pairs = tiny_subject(family, torch.float64), random_pairs(4, 9, VOCAB)
    for pair in pairs:
        pair.treated[-1] = pair.control[-1]  # so that the embedding brings nothing
    wanted = mediators(subject, ["attn_out.direct", "mlp_out.direct"])
    for openers in (YES_NO, *refusals_against_rest(VOCAB)):
        with true_float64(subject.model):
            table = measure_effects(subject, pairs, {"T2": openers}, wanted, ("contrast.frozen",))
        whole = table.groupby("pair_id")[["nie0", "nie1", "te"]].agg({"nie0": "sum", "nie1": "sum", "te": "first"})
        assert whole.te.abs().min() > 0.01
        np.testing.assert_allclose(whole[["nie0", "nie1"]], whole[["te", "te"]], rtol=0, atol=1e-12)


@pytest.fixture
def mixed() -> list[TokenPair]:
    """Pairs of two lengths and two treatments, shuffled."""
    kinds = [(9, "T2", 1), (11, "B1", 2), (9, "B1", 3), (11, "T2", 4)]
    pairs = [pair for n_pos, name, seed in kinds for pair in random_pairs(3, n_pos, 61, seed=seed, treatment=name)]
    named = [replace(pair, pair=replace(pair.pair, id=f"{pair.pair.treatment}.{i}")) for i, pair in enumerate(pairs)]
    return [named[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def test_batches_are_of_one_treatment_and_length(mixed: list[TokenPair], monkeypatch: pytest.MonkeyPatch) -> None:
    made = estimands.batches(mixed, size=2)
    assert sorted(pair.pair.id for batch in made for pair in batch) == sorted(pair.pair.id for pair in mixed)
    assert all(len({(pair.pair.treatment, len(pair.control)) for pair in batch}) == 1 for batch in made)
    assert sorted(len(batch) for batch in made) == [1] * 4 + [2] * 4
    lengths = [{len(pair.control) for pair in batch} for batch in estimands.batches(mixed, mixed=True)]
    assert lengths == [{9}, {11}]
    subject = tiny_subject("llama")
    need = memory.sweep_memory(subject, 1, 9).clean_run
    for budget, sizes, halves in ((10**9, [12], [12]), (20 * need, [5, 5, 2], [2] * 6), (need, [1] * 12, [1] * 12)):
        monkeypatch.setattr(memory, "CLEAN_RUN_BYTES", budget)
        for runs, wanted in ((2, sizes), (4, halves)):
            made = estimands.batches(random_pairs(12, 9, 61), subject, runs=runs)
            assert [len(batch) for batch in made] == wanted


def test_rows_belong_to_their_pairs_whatever_the_batches(mixed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, pairs = tiny_subject("qwen2"), mixed
    openers = {"T2": YES_NO, "B1": Openers((5,), (6,))}
    sites = [*SITES, "attn_out.direct", "mlp_out.direct"]
    wanted, keys = mediators(subject, sites, ["last", "differ"]), ["pair_id", *estimands.KEYS]
    names = ("Y1", "Y1.frozen", "contrast.frozen")
    table, again = (measure_effects(subject, pairs, openers, wanted, names) for _ in range(2))
    assert table.equals(again) and len(table) == len(pairs) * len(wanted) * 3 and not table.duplicated(keys).any()
    for pair in pairs:
        rows = table.query(f"pair_id == '{pair.pair.id}' and outcome == 'Y1'")
        clean = [float(log_odds(logits, openers[pair.pair.treatment])) for logits in plain_runs(subject, [pair])]
        np.testing.assert_allclose(rows[["y00", "y11"]], [clean] * len(rows), atol=1e-4)
        own = rows[["topic", "treatment", "split"]].drop_duplicates().values.tolist()
        assert own == [[pair.pair.topic, pair.pair.treatment, "discover"]]
    monkeypatch.setattr(estimands, "batches", partial(estimands.batches, size=1))
    single = measure_effects(subject, pairs, openers, wanted, names)
    whole, single = (one.set_index(keys).sort_index()[[*CELLS, "te", "nie0", "nie1"]] for one in (table, single))
    np.testing.assert_allclose(whole, single, atol=2e-5 * table.te.abs().max())


# Y2: whole answers, against one hooked forward pass a pair and cell over the unpadded prompt and answer
OPENERS = {"T2": Openers((10, 12, 13), (20, 21)), "T2b": Openers((30,), (40, 41))}


def texts(subject: Subject, pair: TokenPair) -> tuple[Tensor, Tensor]:
    """Answer and refusal of one pair, without padding."""
    prompts = estimands.prompt_tokens(subject, [pair])
    answer, refusal = outcomes.continuations(subject, *prompts, [OPENERS[pair.pair.treatment]])
    return answer[0][answer[1]], refusal[0][refusal[1]]


def log_p(subject: Subject, pair: TokenPair, text: Tensor, cell: str, mediator: Mediator) -> float:
    """The library's own loss over one text, with a module's output at prompt positions taken from the other prompt."""
    prompts, n = [torch.cat([torch.tensor(ids), text])[None] for ids in (pair.control, pair.treated)], len(pair.control)
    base, source = (prompts[int(which)] for which in cell[1:])
    labels, where = base.clone(), torch.zeros_like(base, dtype=torch.bool)
    labels[:, :n], where[0, :n] = -100, torch.tensor(positions.groups(pair, "")[mediator.position])
    return -swapped(subject, mediator, base, source, where, labels=labels).loss.item() * len(text)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("ends", [False, True])
def test_whole_answers_against_hooked_forward_passes(family: str, ends: bool) -> None:
    pairs = random_pairs(2, 8, 61) + random_pairs(3, 9, 61, seed=1, treatment="T2b")
    pairs = [replace(pair, pair=replace(pair.pair, id=f"pair {i}")) for i, pair in enumerate(pairs)]
    subject = tiny_subject(family)
    subject.model.generation_config.eos_token_id = subject.model.config.eos_token_id = None
    if ends:
        stops = texts(subject, pairs[0])[0][5], texts(subject, pairs[-1])[1][9]
        subject.model.generation_config.eos_token_id = [int(token) for token in stops]
    wanted = [Mediator("attn_out", 2), Mediator("resid_post", 1, "rest"), Mediator("mlp_out", 0, "all")]
    groups = estimands.batches(pairs[::-1], subject)
    measured = [[estimands.whole_answer_effects(subject, one, OPENERS, wanted) for one in groups] for _ in range(2)]
    table, again = (pd.concat(tables, ignore_index=True) for tables in measured)
    assert len(table) == len(pairs) * len(wanted) and set(table.outcome) == {"Y2"} and table.equals(again)
    lengths, rows = set(), table.set_index(["pair_id", "site", "layer", "position"])
    for pair in pairs:
        both = texts(subject, pair)
        lengths |= {len(text) for text in both}
        for one, name in product(wanted, CELLS):
            answer, refusal = (log_p(subject, pair, text, name, one) for text in both)
            found = rows.loc[(pair.pair.id, one.site, one.layer, one.position), name]
            assert found == pytest.approx(answer - refusal, abs=2e-4)
    assert len(lengths) > 2 if ends else lengths == {24}
    assert (table[["nie0", "nie1"]].abs() > 1e-2).any(axis=None)


# ---- outcomes ----

CAMPS = Openers((10, 12, 13), (20, 21))
EQUAL = (torch.full((3,), 1 / 3), torch.full((2,), 1 / 2))  # every opener counts the same


def final(subject: Subject, ids: Tensor) -> Tensor:
    return activations.clean_run(subject, ids).resid_post[-1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_odds_are_those_of_the_library(family: str) -> None:
    subject, ids = tiny_subject(family), tokens()
    p = subject.model(ids).logits.detach().double().softmax(-1)
    wanted = [p[..., list(camp)].sum(-1) for camp in (CAMPS.comply, CAMPS.refuse)]
    found = outcomes.log_odds(subject, final(subject, ids), CAMPS)
    np.testing.assert_allclose(found, wanted[0].log() - wanted[1].log(), atol=1e-5)
    camps = outcomes.opener_probabilities(subject, final(subject, ids)[:, -1], CAMPS)
    np.testing.assert_allclose(torch.stack(camps), torch.stack(wanted)[..., -1], rtol=1e-5)  # over the whole vocabulary
    assert found.dtype == torch.float64 and (sum(wanted) < 0.9).all()


def test_camp_weights_make_the_contrast_follow_y1() -> None:
    """Y1's own weights at both ends: an opener that the model never says must not count as much as the one it says."""
    subject = tiny_subject("llama")
    control, treated = (final(subject, tokens(seed=seed))[:, -1] for seed in (0, 4))
    both = outcomes.opener_weights(subject, control, treated, CAMPS)
    assert all(weights.sum(-1).numpy() == pytest.approx(1) for weights in both)
    for resid in (control, treated):  # a small step from either end moves both alike, up to the other end's weights
        same = outcomes.opener_weights(subject, resid, resid, CAMPS)
        step = 1e-3 * torch.randn(resid.shape, generator=torch.Generator().manual_seed(0))
        moved = [outcomes.log_odds(subject, at, CAMPS, resid) for at in (resid, resid + step)]
        linear = [outcomes.contrast(subject, at, CAMPS, resid, same) for at in (resid, resid + step)]
        torch.testing.assert_close(moved[1] - moved[0], linear[1] - linear[0], atol=2e-5, rtol=0.02)
    te, errors = outcomes.log_odds(subject, treated, CAMPS) - outcomes.log_odds(subject, control, CAMPS), []
    for weights in (both, EQUAL):
        start, end = (outcomes.contrast(subject, resid, CAMPS, None, weights) for resid in (control, treated))
        errors.append(float((end - start - te).abs().mean()))
    assert errors[0] < 0.2 * errors[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_refusals_against_everything_else(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    subject, ids = tiny_subject(family, torch.float64), tokens()
    rest, lists = refusals_against_rest(VOCAB, (*range(14, 21), 33))
    with true_float64(subject.model):
        control, treated = final(subject, ids)[:, -1:], final(subject, tokens(seed=4))[:, -1:]
        found = outcomes.log_odds(subject, control, rest)
        wanted = log_odds(subject.model(ids).logits[:, -1:], lists)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        weights = outcomes.opener_weights(subject, control, treated, rest)
        for name in ("Y1.frozen", "contrast.frozen"):
            cells = torch.cat([control, treated, 0.3 * control + 0.7 * treated], 1)
            both = [outcomes.named_outcome(subject, cells, control, treated, one, name) for one in (rest, lists)]
            torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)
            if name == "contrast.frozen" and subject.soft_cap is None:  # components' direct effects add up
                torch.testing.assert_close(both[0][:, 2], 0.3 * both[0][:, 0] + 0.7 * both[0][:, 1], rtol=0, atol=1e-12)
        for one, other in zip(weights, outcomes.opener_weights(subject, control, treated, lists), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
        camps = [outcomes.opener_probabilities(subject, control[:, 0], one) for one in (rest, lists)]
        torch.testing.assert_close(camps[0], camps[1], rtol=0, atol=1e-14)
    texts = [outcomes.continuations(subject, ids, tokens(seed=4), [one] * 3, steps=4) for one in (rest, lists)]
    assert texts[0][0][0].equal(texts[1][0][0]) and not set(texts[0][0][0][:, 0].tolist()) & set(rest.refuse)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_rest_is_exact_in_float32_where_one_side_has_everything(scale: float) -> None:
    """Sums of exponentials neither overflow nor lose the side that is hardly ever said."""
    logits = scale * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    refuse = logits[0].topk(3).indices.tolist()
    parts = ((start, logits[:, start : start + 8].clone()) for start in range(0, 40, 8))
    wanted = log_odds(logits, refusals_against_rest(40, tuple(refuse))[1])
    torch.testing.assert_close(readout.rest_against(parts, refuse), wanted, rtol=1e-6, atol=1e-6)


def greedy(subject: Subject, prompt: Tensor, camp: tuple[int, ...], steps: int, ends: tuple[int, ...]) -> list[int]:
    """One token at a time, no cache: the likeliest of the camp first, then the likeliest of all."""
    text: list[int] = []
    while len(text) < steps and not (text and text[-1] in ends):
        logits = subject.model(torch.cat([prompt, torch.tensor(text, dtype=torch.long)])[None]).logits[0, -1]
        text.append(int(logits.argmax()) if text else camp[int(logits[list(camp)].argmax())])
    return text


SAMPLED = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 1}


@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_continuations_are_greedy_behind_the_forced_opener_of_each_pair(settings: dict) -> None:
    subject = tiny_subject("llama")
    control, treated = tokens(5, 7, seed=1), tokens(5, 7, seed=2)
    own = [CAMPS, Openers((21, 8), (44,)), CAMPS, CAMPS, CAMPS]
    plain = [greedy(subject, prompt, one.comply, 9, ()) for prompt, one in zip(treated, own, strict=True)]
    ends = (plain[0][3], plain[1][5])  # so that two texts stop early
    for name, value in {"eos_token_id": list(ends), **settings}.items():
        setattr(subject.model.generation_config, name, value)
    found = outcomes.continuations(subject, control, treated, own, steps=9)
    for prompts, kind, (text, mask) in zip((treated, control), ("comply", "refuse"), found, strict=True):
        wanted = [greedy(subject, ids, getattr(one, kind), 9, ends) for ids, one in zip(prompts, own, strict=True)]
        assert [row[keep].tolist() for row, keep in zip(text, mask, strict=True)] == wanted
    assert len(set(found[0][1].sum(1).tolist())) > 1


def test_texts_behind_a_shared_opening_are_those_behind_each_prompt_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, prompts = from_model(tiny_model("llama")), (tokens(5, 12, seed=1), tokens(5, 12, seed=2))
    for ids in prompts:
        ids[:, :9] = prompts[0][0, :9]

    def made() -> tuple:
        texts = outcomes.continuations(subject, *prompts, [CAMPS] * 5, steps=6)
        run = outcomes.forced_run(subject, prompts[0], texts[0], beside=prompts)
        said = decode.greedy_answers(subject, prompts[0], 6)
        return texts, run.resid_post, torch.tensor(said.ids)

    plain = made()
    monkeypatch.setattr(activations, "SMALLEST", 0)
    monkeypatch.setattr(activations, "PAYS", {"cpu": 1})
    seen, real = [], activations._in_two
    monkeypatch.setattr(activations, "_in_two", lambda block, layer, n: seen.append(n) or real(block, layer, n))
    torch.testing.assert_close(made(), plain, atol=1e-4, rtol=1e-4)
    assert seen == [9] * 3 * subject.n_layers
