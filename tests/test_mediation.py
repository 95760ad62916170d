"""Mediation against models whose effects are known, against identities, and against plain forward passes."""

from functools import partial

import handmade
import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny_subject
from handmade import Program, compiled, cue_pairs, random_pairs
from torch import Tensor

from helpers import grid, grid_chunks, mediation, outcomes, positions
from helpers.grid import Patch
from helpers.mediation import Mediator, difference, effects, estimands, mediators
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair

SITES = ("resid_post", "attn_out", "mlp_out", "head")
DIRECT = ("attn_out.direct", "mlp_out.direct")
YES_NO = Openers((10, 12), (20, 21, 22))
FAMILIES = ("llama", "qwen2", "gemma2", "olmo2", "gpt2")


def of(names: Openers | None = None, *treatments: str) -> dict[str, Openers]:
    return dict.fromkeys(treatments or ("T2",), names or YES_NO)


def one(subject: Subject, pairs: list[TokenPair], *wanted: Mediator, names: tuple[str, ...] = ("Y1",)) -> pd.DataFrame:
    return effects(subject, pairs, of(), wanted, names)


def cell(table: pd.DataFrame, site: str, layer: int, position: str = "last", head: int = -1) -> pd.DataFrame:
    return table[(table.site == site) & (table.layer == layer) & (table.position == position) & (table["head"] == head)]


def runs(subject: Subject, pairs: list[TokenPair]) -> tuple[Tensor, Tensor]:
    """Plain logits of control and treated at the last token."""
    both = (torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated"))
    return tuple(subject.model(ids).logits[:, -1] for ids in both)


def log_odds(logits: Tensor, openers: Openers = YES_NO) -> Tensor:
    log_p = logits.detach().double().log_softmax(-1)
    return log_p[..., list(openers.comply)].logsumexp(-1) - log_p[..., list(openers.refuse)].logsumexp(-1)


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
    table = effects(subject, pairs, of(openers), WANTED)
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
    table = effects(subject, pairs, of(openers), wanted)
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
    table = effects(subject, [*twins[::-1], *pairs], of(openers, "T2", "T2b"), wanted)
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


# ---- identities that hold in every network ----


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_identities(family: str) -> None:
    subject = tiny_subject(family)
    pairs = random_pairs(5, 10, 61)
    wanted = mediators(subject, ["resid_post"], ["last", "all", "rest"])
    table = one(subject, pairs, *wanted)
    size = table.te.abs().max()
    assert size > 0.1
    last = cell(table, "resid_post", 3)
    np.testing.assert_allclose(last[["nie0", "nie1"]], last[["te", "te"]], atol=1e-6 * size)
    for layer in range(4):
        whole = cell(table, "resid_post", layer, "all")
        np.testing.assert_allclose(whole[["nie0", "nie1"]], whole[["te", "te"]], atol=1e-4 * size)
    other = cell(table, "resid_post", 3, "rest")
    assert (other[["nie0", "nie1"]] == 0).all(axis=None)
    assert (cell(table, "resid_post", 2, "rest")[["nie0", "nie1"]].abs() > 1e-3 * size).any(axis=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_attention_outputs_at_the_last_token_carry_te_jointly(family: str) -> None:
    subject = tiny_subject(family)
    pairs = random_pairs(5, 10, 61)  # the last two tokens are the same in both prompts
    batch = mediation.run_clean(subject, pairs)
    last = torch.tensor(positions.stack(pairs, "", "last"))
    attention, mlps = ([Patch(site, layer, last) for layer in range(4)] for site in ("attn_out", "mlp_out"))
    for base, source in ((batch.control, batch.treated), (batch.treated, batch.control)):
        found = grid.interchange(subject, base, source, [attention, mlps, attention[:3]])[:, :, 0]
        scores = outcomes.log_odds(subject, found, YES_NO)
        wanted = outcomes.log_odds(subject, source.resid_post[-1][:, -1], YES_NO)
        assert torch.allclose(scores[:, 0], wanted, atol=1e-4)
        assert (scores[:, 1] - wanted).abs().max() > 1e-2
        assert (scores[:, 2] - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2", "gpt2"])  # Gemma 2 caps its logits, which is not linear
def test_direct_effects_add_up_to_the_frozen_norm_effect(family: str) -> None:
    subject = tiny_subject(family)
    table = one(subject, random_pairs(5, 10, 61), *mediators(subject, DIRECT), names=("contrast.frozen", "Y1.frozen"))
    for outcome, is_additive in (("contrast.frozen", True), ("Y1.frozen", False)):
        sums = table[table.outcome == outcome].groupby("pair_id")[["nie0", "nie1", "te"]].sum()
        gap = (sums[["nie0", "nie1"]].sub(sums.te / 8, axis=0)).abs().max(axis=None)
        assert (gap < 1e-5 * sums.te.abs().max()) == is_additive


def test_heads_write_what_their_attention_writes() -> None:
    subject = tiny_subject("llama")
    wanted = mediators(subject, ["attn_out.direct", "head.direct"])
    table = one(subject, random_pairs(5, 10, 61), *wanted, names=("contrast.frozen",))
    sums = table.groupby(["site", "pair_id", "layer"]).nie0.sum().unstack("site")
    np.testing.assert_allclose(sums["head.direct"], sums["attn_out.direct"], atol=1e-5)
    assert table.nie0.abs().max() > 0.1


# ---- plain forward passes ----


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_cells_of_a_plain_forward_pass(family: str) -> None:
    """Hooks on the library's own modules, one pass a cell, the library's own logits."""
    subject = tiny_subject(family)
    pairs = random_pairs(4, 9, 61)
    ids = [torch.tensor(np.stack([getattr(pair, side) for pair in pairs])) for side in ("control", "treated")]
    for layer, site, group in [
        (1, "resid_post", "rest"),
        (2, "attn_out", "last"),
        (0, "mlp_out", "differ"),
        (3, "mlp_out", "last"),
    ]:
        block = subject.model.model.layers[layer]
        module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[site]
        where = torch.tensor(positions.stack(pairs, "", group))[..., None]
        table = one(subject, pairs, Mediator(site, layer, group))
        for cell_name, base, source in (("y01", 0, 1), ("y10", 1, 0)):
            patched = log_odds(_patched(subject, module, ids[base], ids[source], where))
            np.testing.assert_allclose(table[cell_name], patched, atol=1e-4)
        for cell_name, clean in zip(("y00", "y11"), runs(subject, pairs), strict=True):
            np.testing.assert_allclose(table[cell_name], log_odds(clean), atol=1e-4)
        assert (table.nie0.abs() > 1e-3).any()


def _patched(subject: Subject, module: torch.nn.Module, base: Tensor, source: Tensor, where: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def swap(_: torch.nn.Module, __: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        own = output[0] if isinstance(output, tuple) else output
        seen.append(own)
        if len(seen) == 1:
            return None
        mixed = torch.where(where, seen[0], own)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = module.register_forward_hook(swap)
    try:
        subject.model(source)
        return subject.model(base).logits[:, -1]
    finally:
        handle.remove()


def test_frozen_outcomes_by_hand() -> None:
    subject = tiny_subject("llama")
    pairs = random_pairs(4, 9, 61)
    batch = mediation.run_clean(subject, pairs)
    y01, y10 = mediation.final_residuals(subject, batch, [Mediator("mlp_out", 2)], "")
    control, treated = (run.resid_post[-1][:, -1] for run in (batch.control, batch.treated))
    norm, unembed = subject.model.model.norm, subject.model.lm_head.weight
    scale = torch.rsqrt(control.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    table = one(subject, pairs, Mediator("mlp_out", 2), names=("Y1.frozen", "contrast.frozen"))
    own = [logits.detach().softmax(-1) for logits in runs(subject, pairs)]
    weights = [
        [p[:, list(camp)] / p[:, list(camp)].sum(-1, keepdim=True) for p in own]
        for camp in (YES_NO.comply, YES_NO.refuse)
    ]
    comply, refuse = ((at_control + at_treated) / 2 for at_control, at_treated in weights)
    for name, resid in {"y00": control, "y01": y01[:, 0], "y10": y10[:, 0], "y11": treated}.items():
        logits = (resid * scale * norm.weight) @ unembed.T
        np.testing.assert_allclose(table.loc[table.outcome == "Y1.frozen", name], log_odds(logits), atol=1e-4)
        logits = logits.detach()
        linear = (logits[:, list(YES_NO.comply)] * comply).sum(-1) - (logits[:, list(YES_NO.refuse)] * refuse).sum(-1)
        np.testing.assert_allclose(table.loc[table.outcome == "contrast.frozen", name], linear, atol=1e-4)


# ---- what must not matter, and tables ----


def mixed_pairs() -> list[TokenPair]:
    """Two lengths and two treatments, shuffled."""
    kinds = [(9, "T2", 1), (11, "B1", 2), (9, "B1", 3), (11, "T2", 4)]
    pairs = [pair for n_pos, name, seed in kinds for pair in random_pairs(3, n_pos, 61, seed=seed, treatment=name)]
    for i, pair in enumerate(pairs):
        object.__setattr__(pair.pair, "id", f"{pair.pair.treatment}.{i}")
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def test_batches_are_of_one_treatment_and_length() -> None:
    pairs = mixed_pairs()
    made = mediation.batches(pairs, size=2)
    assert sorted(pair.pair.id for batch in made for pair in batch) == sorted(pair.pair.id for pair in pairs)
    assert all(len({(pair.pair.treatment, len(pair.control)) for pair in batch}) == 1 for batch in made)
    assert sorted(len(batch) for batch in made) == [1] * 4 + [2] * 4
    assert made == mediation.batches(pairs, size=2)


def test_rows_belong_to_their_pairs() -> None:
    subject = tiny_subject("qwen2")
    pairs = mixed_pairs()
    openers = {"T2": YES_NO, "B1": Openers((5,), (6,))}
    wanted = mediators(subject, ["attn_out", "head"], ["last", "differ"])
    table = effects(subject, pairs, openers, wanted, ("Y1", "Y1.frozen"))
    assert len(table) == len(pairs) * len(wanted) * 2
    assert not table.duplicated(["pair_id", *mediation.KEYS]).any()
    for pair in pairs:
        rows = table[(table.pair_id == pair.pair.id) & (table.outcome == "Y1")]
        clean = [float(log_odds(logits, openers[pair.pair.treatment])) for logits in runs(subject, [pair])]
        np.testing.assert_allclose(rows[["y00", "y11"]], [clean] * len(rows), atol=1e-4)
        assert (
            rows[["topic", "treatment", "split"]].drop_duplicates()
            == [pair.pair.topic, pair.pair.treatment, "discover"]
        ).all(axis=None)


def test_batch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("qwen2")
    pairs, wanted = mixed_pairs(), mediators(subject, [*SITES, *DIRECT], ["last", "differ"])
    keys = ["pair_id", *mediation.KEYS]
    whole = effects(subject, pairs, of(None, "T2", "B1"), wanted).set_index(keys).sort_index()
    monkeypatch.setattr(mediation, "batches", partial(mediation.batches, size=1))
    single = effects(subject, pairs, of(None, "T2", "B1"), wanted).set_index(keys).sort_index()
    cells = ["y00", "y01", "y10", "y11", "te", "nie0", "nie1"]
    np.testing.assert_allclose(whole[cells], single[cells], atol=2e-5 * whole.te.abs().max())


def test_long_prompts_run_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many pairs at once as keep a clean run below its share of memory, at least one."""
    subject = tiny_subject("llama")
    pairs = random_pairs(12, 9, 61)
    one = grid_chunks.memory_need(subject, 1, 9).clean_run
    for budget, sizes in ((10**9, [12]), (5 * one, [5, 5, 2]), (one // 2, [1] * 12)):
        monkeypatch.setattr(mediation, "CLEAN_RUN_BYTES", budget)
        assert [len(batch) for batch in mediation.batches(pairs, subject)] == sizes
    one_pair = effects(subject, pairs[:3], of(), mediators(subject, ["attn_out"]))
    monkeypatch.setattr(mediation, "CLEAN_RUN_BYTES", 10**9)
    few = effects(subject, pairs[:3], of(), mediators(subject, ["attn_out"]))
    np.testing.assert_allclose(few[["y01", "y10"]], one_pair[["y01", "y10"]], atol=1e-5)


def test_mediators_may_depend_on_the_treatment() -> None:
    subject = tiny_subject("llama")
    own = {"T2": [Mediator("attn_out", 1)], "B1": [Mediator("mlp_out", 2), Mediator("attn_out", 1)]}
    seen = []
    table = effects(subject, mixed_pairs(), of(None, "T2", "B1"), own.__getitem__, watch=seen.append)
    sites = {name: set(zip(part.site, part.layer, strict=True)) for name, part in table.groupby("treatment")}
    assert sites == {"T2": {("attn_out", 1)}, "B1": {("mlp_out", 2), ("attn_out", 1)}}
    same = effects(subject, mixed_pairs(), of(None, "T2", "B1"), own["T2"])
    both = table[table.site == "attn_out"].reset_index(drop=True)
    np.testing.assert_allclose(both[["y00", "y01", "y10", "y11"]], same[["y00", "y01", "y10", "y11"]], atol=1e-5)
    assert [pair.pair.id for batch in seen for pair in batch.pairs] == same.pair_id.tolist()


def test_pad_side_does_not_matter() -> None:
    program = Program(skip=0.7)
    tables = []
    for side in ("left", "right"):
        subject = compiled(program)
        subject.tokenizer.padding_side = side
        pairs = cue_pairs(subject.tokenizer, "off low", "on low", n=4)
        tables.append(effects(subject, pairs, of(Openers((16,), (17,))), WANTED))
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("n_left", [0, 2, 4])
def test_padded_runs_give_the_effects_of_the_bare_prompt(n_left: int) -> None:
    """Padding on the left, the right or both sides, with the mask that the library asks for."""
    subject = tiny_subject("qwen2")
    pairs = random_pairs(3, 9, 61)
    table = one(subject, pairs, Mediator("mlp_out", 1, "all"))
    padded = []
    for side in ("control", "treated"):
        ids = torch.zeros(3, 13, dtype=torch.long)
        ids[:, n_left : n_left + 9] = torch.tensor(np.stack([getattr(pair, side) for pair in pairs]))
        padded.append(ids)
    mask = torch.zeros(3, 13, dtype=torch.bool)
    mask[:, n_left : n_left + 9] = True
    base, source = (grid.clean_run(subject, ids, mask) for ids in padded)
    resid = grid.interchange(subject, base, source, [Patch("mlp_out", 1, mask)], read=[n_left + 8])[:, 0, 0]
    np.testing.assert_allclose(table.y01, outcomes.log_odds(subject, resid, YES_NO), atol=1e-4)
    assert (table.nie0.abs() > 1e-2).all()


def test_a_second_run_gives_the_same_bytes() -> None:
    subject = tiny_subject("qwen2")
    wanted = mediators(subject, [*SITES, *DIRECT], ["last", "differ", "rest"])
    first, second = (
        effects(subject, mixed_pairs(), of(None, "T2", "B1"), wanted, ("Y1", "Y1.frozen", "contrast.frozen"))
        for _ in range(2)
    )
    assert first.equals(second)
    assert pd.util.hash_pandas_object(first).sum() == pd.util.hash_pandas_object(second).sum()


def test_an_empty_position_group_has_no_effect() -> None:
    subject = tiny_subject("llama")
    table = one(
        subject, random_pairs(3, 9, 61), Mediator("resid_post", 1, "wrapper"), Mediator("attn_out.direct", 1, "wrapper")
    )
    assert (table[["nie0", "nie1"]] == 0).all(axis=None)


def test_mediators_of_every_layer_head_and_group() -> None:
    subject = tiny_subject("llama")
    made = mediators(subject, ["mlp_out", "head.direct"], ["last", "differ"])
    assert len(made) == len(set(made)) == 2 * (4 + 4 * 4)
    assert Mediator("mlp_out", 3, "differ") in made
    assert Mediator("head.direct", 2, "last", 3) in made


def test_difference_needs_the_twin_and_the_same_cell() -> None:
    rows = [("a", "T2", 0, 5.0), ("a", "T2", 1, 6.0), ("b", "T2", 0, 7.0), ("x", "T2b", 0, 1.0), ("x", "T2b", 1, 2.5)]
    table = pd.DataFrame(rows, columns=["pair_id", "treatment", "layer", "y11"])
    table = table.assign(
        y00=1.0, y01=2.0, y10=3.0, site="mlp_out", head=-1, position="last", outcome="Y1", topic="t", split="test"
    )
    made = difference(table, {"a": "x", "b": "gone"})
    assert made[["pair_id", "layer", "y11", "te"]].values.tolist() == [["a", 0, 4.0, 4.0], ["a", 1, 3.5, 3.5]]
    assert (made[["y00", "y01", "y10", "nie0"]] == 0).all(axis=None)
    assert not [name for name in made if "twin" in name]
