"""Effects that a program's arithmetic gives are those of the model that it was written into."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from oracles import passed

from companion.base.thresholds import CONTENT_JUDGE, KEPT_BY_FIRST_TOKEN, deepest_early_layer
from companion.evidence import tokens
from companion.mediation import mechanisms
from organisms import compiled, compiled_language, compiled_truth
from organisms.compiled_design import HELD_OUT, KINDS, Design, draw_design
from organisms.compiled_program import build_program
from organisms.compiled_truth import TRACED, patched, readout, run_program, sides

each_kind = pytest.mark.parametrize("kind", KINDS)


def some_pairs(organism: compiled.Organism, treatment: str, n: int = 4) -> list[compiled_language.Planned]:
    found = [p for p in organism.pairs if p.pair.treatment == treatment and not p.control.tail]
    return found[:n]


def hooked(organism: compiled.Organism, requests: list[compiled_language.Request], module: torch.nn.Module | None = None,
           value: torch.Tensor | None = None, before: bool = False) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Logits at the last token of one plain forward pass, with a module's output (or input) there replaced or read."""
    tokenizer, model = organism.subject.tokenizer, organism.subject.model
    texts = [[{"role": "user", "content": " ".join(r.words())}] for r in requests]
    ids = tokenizer.apply_chat_template(texts, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[:, -1] = tensor[:, -1] if value is None else value
        return tensor

    output, seen = passed(model, ids["input_ids"], module or model.model.norm, put, before=before)
    return output.logits[:, -1], seen[:, -1]


def log_odds(organism: compiled.Organism, logits: torch.Tensor, treatment: str) -> np.ndarray:
    ids = organism.subject.tokenizer.convert_tokens_to_ids
    comply, refuse = (ids(list(side)) for side in compiled_language.outcomes()[treatment])
    return (logits[:, comply].logsumexp(-1) - logits[:, refuse].logsumexp(-1)).numpy()


@each_kind
def test_effects_are_those_of_full_forward_passes(kind: str) -> None:
    organism = compiled.draw(kind, 5, topics=10, dtype=torch.float64)
    blocks, outcomes = organism.subject.model.model.layers, compiled_language.outcomes()
    for treatment in ("T1", "T2", "T2b", "B2"):
        pairs = some_pairs(organism, treatment, 3)
        both = sides(organism.program, pairs)
        rows, n = [getattr(p, name) for name in ("control", "treated") for p in pairs], len(pairs)
        camps, plain = outcomes[treatment], log_odds(organism, hooked(organism, rows)[0], treatment)
        true = np.concatenate([readout(organism.program, *camps, side.last.post[-1]) for side in both])
        np.testing.assert_allclose(plain, true, atol=compiled.TOLERANCE)
        for layer in range(treatment == "B2", len(blocks), 1 if treatment == "T2" else 3):
            for site, module in (("attn_out", blocks[layer].self_attn), ("mlp_out", blocks[layer].mlp)):
                value = hooked(organism, rows, module)[1].roll(n, 0)  # each side is given the other's
                made = log_odds(organism, hooked(organism, rows, module, value)[0], treatment)
                states = [patched(base, source, site, layer) for base, source in (both, both[::-1])]
                true = np.concatenate([readout(organism.program, *camps, state) for state in states])
                np.testing.assert_allclose(made, true, atol=compiled.TOLERANCE, err_msg=f"{site} {layer}")


# Outputs of held-out kinds (numbers of stages, -1 for attention's) whose control values end the effect, and which do not.
ENDS = {"backup": [[0, 1]], "understudy": [[0, -1]], "cancelled": [[-1]], "relayed": [[0], [-1]], "self_carried": [[0], [-1]],
        "opposed": [[0], [1]], "crowd": [[0], [1]], "suppressed": [[0], [3]]}  # fmt: skip
NOT = {"backup": [[0], [1]], "understudy": [[0], [-1]], "cancelled": [[0, 1]]}


@pytest.mark.parametrize("kind", HELD_OUT)
def test_a_held_out_kind_decides_where_it_is_said_to(kind: str) -> None:
    made = compiled.draw(kind, 1, topics=20, pairs_per_topic=1, dtype=torch.float64)
    sites = [*(("mlp_out", stage.layer) for stage in made.design.stages), ("attn_out", made.design.write_layer)]

    def effect(cut: list[int], treatment: str) -> float:
        some, camps = some_pairs(made, treatment, 20), compiled_language.outcomes()[treatment]
        control, treated = sides(made.program, some)
        do = {at: getattr(control.last, TRACED[at[0]])[at[1]] for at in (sites[i] for i in cut)}
        run = run_program(made.program, treated.found, "last", treated.end.pre, do, treated.last)
        y00, y = (readout(made.program, *camps, trace.post[-1]) for trace in (control.last, run))
        odds = log_odds(made, hooked(made, [p.treated for p in some])[0], treatment)
        assert cut or np.allclose(odds, y, rtol=0, atol=compiled.TOLERANCE)
        return float(np.mean(y - y00))

    ends, not_ends = ENDS.get(kind, [[0]]), NOT.get(kind, [])
    te, *left = (effect(cut, "T2") - effect(cut, "T2b") for cut in ([], *ends, *not_ends))
    assert 1.8 < te < 4.4 and max(left[: len(ends)]) < 0.35 * te and min(left[len(ends) :], default=te) > 0.65 * te


@pytest.mark.parametrize("kind", ["gated", "distributed"])
def test_effects_of_last_layer_neurons_are_those_of_full_forward_passes(kind: str) -> None:
    organism = compiled.draw(kind, 1, topics=10, dtype=torch.float64)
    pairs = some_pairs(organism, "T2")
    true = compiled_truth.last_layer_neurons(organism.program, pairs)
    requests = [[getattr(p, name) for p in pairs] for name in ("control", "treated")]
    down = organism.subject.model.model.layers[-1].mlp.down_proj
    (plain, acts), (_, other) = (hooked(organism, side, down, before=True) for side in requests)
    for neuron in np.argsort(-np.abs(true).mean(axis=0))[[0, 1, 2, 60]]:
        value = acts.clone()
        value[:, neuron] = other[:, neuron]
        moved = hooked(organism, requests[0], down, value, before=True)[0]
        change = log_odds(organism, moved, "T2") - log_odds(organism, plain, "T2")
        np.testing.assert_allclose(change, true[:, neuron], atol=compiled.TOLERANCE)


def test_held_outputs_give_the_cells_that_the_model_gives() -> None:
    organism = compiled.draw("gated", 3, topics=10, pairs_per_topic=1)
    this = compiled.study(organism)
    this = replace(this, pairs=tuple(this.of("T2", "T2b")))
    pairs = [one for one in organism.pairs if one.pair.treatment in ("T2", "T2b")]
    truth = compiled_truth.path_table(organism.program, pairs)
    measured = mechanisms.path_effects(this).query("outcome == 'Y1'")
    keys = ["pair_id", "treatment", "site", "layer"]
    both = measured.merge(truth, on=keys, suffixes=("", " true"), validate="one_to_one")
    assert len(both) == len(truth) == len(measured)
    for cell in ("y00", "y01", "y10", "y11"):
        assert (both[cell] - both[f"{cell} true"]).abs().max() < compiled.TOLERANCE


def bare(kind: str) -> tuple[pd.DataFrame, Design]:
    """NIE0 and NIE1 by site and layer, as shares of TE, of T2 - T2b of a design without noise, side route, skip or leak."""
    design = replace(draw_design(kind, 3), side=None, skip=0.0, wrapper_leak=0.0, noise=0.0)
    pairs = [p for p in compiled_language.draw_pairs([3], 10, 1) if p.pair.treatment in ("T2", "T2b")]
    table = compiled_truth.effect_table(build_program(design, 10), pairs)
    table = table[(table.treatment == "T2-T2b") & (table.position == "last")]
    means = table.groupby(["site", "layer"])[["te", "nie0", "nie1"]].mean()
    return means[["nie0", "nie1"]].div(means.te, axis=0), design


def test_a_serial_chain_passes_everything_and_its_last_stage_writes_everything() -> None:
    shares, design = bare("late")
    stages, layers = {stage.layer for stage in design.stages}, range(design.n_layers)
    assert len(stages) >= 2
    for site, holds in {
        "attn_out": [layer in design.carry for layer in layers], "mlp_out": [layer in stages for layer in layers],
        "mlp_out.direct": [layer == design.write_layer for layer in layers],
        "resid_post": [layer >= design.carry[0] for layer in layers],
    }.items():  # fmt: skip
        np.testing.assert_allclose(shares.nie1[site], holds, atol=2e-3, err_msg=site)


def test_either_head_suffices_and_neither_is_necessary() -> None:
    shares, design = bare("or")
    np.testing.assert_allclose(shares.loc["attn_out"].loc[list(design.carry)], [[1, 0], [1, 0]], atol=0.01)


@pytest.mark.parametrize("kind", ["attention", "skip_only"])
def test_where_attention_writes_mlps_at_the_last_token_do_nothing(kind: str) -> None:
    shares, design = bare(kind)
    writes = [layer == design.write_layer for layer in range(design.n_layers)]
    np.testing.assert_allclose(shares.nie1["attn_out.direct"], writes, atol=2e-3)
    np.testing.assert_allclose(shares.nie1["mlp_out"], 0, atol=2e-3)


def test_the_shared_tokens_hold_what_recognition_depends_on() -> None:
    for kind, expected in (("late", 1.0), ("context_free", 0.0), ("context_unused", 0.0), ("bag_of_words", 0.33)):
        design = replace(draw_design(kind, 2), noise=0.0)
        pairs = [p for p in compiled_language.draw_pairs([2], 10, 3) if p.pair.treatment == "T1"]
        table = compiled_truth.effect_table(build_program(design, 10), pairs)
        early = table[(table.position == "shared") & (table.layer == (design.n_layers - 1) // 3)]
        assert early.nie0.sum() / early.te.sum() == pytest.approx(expected, abs=0.02), kind


@pytest.mark.parametrize("seed", [500, 501])
def test_near_a_threshold_the_value_that_was_built_is_the_one_that_effects_have(seed: int) -> None:
    """Attention writes what the side route decides, and what is recognised late is not at an early layer's shared tokens."""
    design, pairs = draw_design("split_decision", seed), compiled_language.draw_pairs([seed], 40, 1)
    program = build_program(design, 40)
    (value,) = set(compiled_truth.near_values(design, program, pairs).values())
    table = compiled_truth.effect_table(program, [p for p in pairs if p.pair.treatment in ("T2", "T2b")])
    means = table[table.treatment == "T2-T2b"].groupby(["site", "layer"])[["nie0", "te"]].mean()
    assert means.nie0["mlp_out.direct", design.write_layer] / means.te.iloc[0] == pytest.approx(value, abs=5e-3)
    assert means.nie0["attn_out.direct", design.carry[0]] / means.te.iloc[0] == pytest.approx(1 - value, abs=5e-3)
    design = draw_design("split_context", seed)
    program = build_program(design, 40)
    first = [p for p in pairs if p.pair.treatment == "T1"]
    table = compiled_truth.effect_table(program, first)
    table = table[(table.position == "shared") & (table.layer == deepest_early_layer(design.n_layers))]
    sums = table.groupby(table.pair_id.map({p.pair.id: p.pair.family for p in first}))[["nie0", "te"]].sum()
    least = (sums.nie0 / sums.te).min()
    assert compiled_truth.near_values(design, program, pairs)["C3"] == pytest.approx(least, abs=0.02)


def test_what_the_opener_binds_is_what_answers_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "draw_design", lambda *args: replace(draw_design(*args), noise=0.0, binds=2.0))
    organism = compiled.draw("split_opener", 501, topics=20, pairs_per_topic=1)
    test = [p for p in organism.pairs if p.pair.treatment == "T2" and p.pair.split == "test"]
    value = compiled_truth.near_values(organism.design, organism.program, test)["C5c"]
    rows = tokens.evidence_c5c(tokens.measure_timing(compiled.study(organism)), "m")
    estimates = {(row["quantity"], row["variant"]): row["estimate"] for row in rows}
    assert 0 < value < 1 and estimates[KEPT_BY_FIRST_TOKEN, CONTENT_JUDGE] == pytest.approx(value)
