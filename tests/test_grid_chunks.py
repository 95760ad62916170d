"""How much runs at once: memory, halving, and the same bytes every time."""

import pytest
import torch
import transformers as hf
from families import tiny_subject
from peak_memory import PeakMemory
from test_grid import every_patch, mask, runs

from companion.base.errors import InputError
from companion.model import activations, memory, propagation, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch
from companion.model.memory import memory_need

KEPT_BY_A_PAIR = ("resid", "attn_out", "mlp_out", "z")


@pytest.fixture(scope="module")
def shaped() -> Subject:
    """The proportions of a real model, small."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=61, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    return find_parts(hf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), None, "shaped")


@pytest.mark.parametrize("columns", [[[31]], [[16], [28]]])
def test_peak_memory_stays_below_one_and_a_half_clean_runs(shaped: Subject, columns: list[list[int]]) -> None:
    """Both clean runs of a pair (without neurons) and the sweep together, against one clean run with all sites."""
    tokens = torch.randint(0, 61, (2, 4, 32), generator=torch.Generator().manual_seed(0))
    with PeakMemory() as memory:
        full = activations.clean_run(shaped, tokens[0])
        all_sites = memory.live()
    del full
    need = memory_need(shaped, 4, 32)
    assert need.clean_run == pytest.approx(all_sites, rel=0.1)
    sites = [("resid_post", None), ("attn_out", None), ("mlp_out", None), *(("head", head) for head in range(4))]
    masks = [mask(column, 4, 32) for column in columns]
    patches = [Patch(site, layer, where, i) for where in masks for layer in range(8) for site, i in sites]
    with PeakMemory() as memory:
        base = activations.clean_run(shaped, tokens[0], keep=(*KEPT_BY_A_PAIR, "cache"))
        source = activations.clean_run(shaped, tokens[1], keep=KEPT_BY_A_PAIR)
        before = memory.live()
        replay.interchange(shaped, base, source, patches, readout=lambda resid: resid[..., :1].clone())
    assert memory.peak < 1.5 * all_sites
    assert memory.peak - before < need.sweep * 1.1


def test_the_budget_depends_on_shapes_only(shaped: Subject) -> None:
    twin = find_parts(hf.AutoModelForCausalLM.from_config(shaped.model.config), None, "twin")
    assert memory.token_budget(shaped, 32) == memory.token_budget(twin, 32)
    assert memory.token_budget(shaped, 64) > memory.token_budget(shaped, 32)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("qwen2", torch.float64)
    pair = runs(subject)
    whole = replay.interchange(subject, *pair, every_patch())
    monkeypatch.setattr(replay, "token_budget", lambda *_: 1)
    one_by_one = replay.interchange(subject, *pair, every_patch())
    torch.testing.assert_close(one_by_one, whole, rtol=0, atol=1e-6)


def too_many(limit: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A sweep that runs out of memory beyond `limit` interventions, as the allocators of GPU and CPU say it."""
    seen: list[int] = []
    plain = propagation.sweep

    def sweep(subject: Subject, base: CleanRun, source: CleanRun, chunk: list, read: torch.Tensor) -> torch.Tensor:
        seen.append(len(chunk))
        if len(chunk) > limit:
            if len(seen) % 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return plain(subject, base, source, chunk, read)

    monkeypatch.setattr(replay, "sweep", sweep)
    return seen


def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    pair = runs(subject)
    patches = every_patch((0, 2))
    whole = replay.interchange(subject, *pair, patches)
    n_events = len(memory.chunk_events())
    seen = too_many(2, monkeypatch)
    with pytest.warns(UserWarning, match="out of memory with .* interventions at once; went on with half as many"):
        halved = replay.interchange(subject, *pair, patches)
    torch.testing.assert_close(halved, whole, rtol=1e-4, atol=1e-5)
    assert len(memory.chunk_events()) - n_events == sum(size > 2 for size in seen) > 0


@pytest.mark.filterwarnings("ignore:out of memory")
def test_one_intervention_too_large_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    too_many(0, monkeypatch)
    with pytest.raises(InputError, match="use fewer pairs at a time"):
        replay.interchange(subject, *runs(subject), [Patch("mlp_out", 0, mask([8]))])


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(replay, "sweep", broken)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        replay.interchange(subject, *runs(subject), [Patch("mlp_out", 0, mask([8]))])
