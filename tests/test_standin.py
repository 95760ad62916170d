"""What a GPU would refuse, tried on a device that stands in for one; the faults found so, each with the test that shows it.

The code of all notebooks runs on it in `test_standin_notebooks.py`.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from models import FAMILIES, VOCAB, tiny_model, tokens
from oracles import every_patch, refusals_against_rest
from torch import Tensor

from benchmarks import gpu_parts
from companion.base import hub
from companion.base.device import Placed, running_sum, to_host
from companion.base.paths import ORGANISM
from companion.generation import decode, forward, labels, outcomes
from companion.generation.hooks import Edit, Steering
from companion.mediation.outcomes import named_outcome, opened_with, opener_probabilities, patched_text_log_probs
from companion.model import activations, load, memory, readout, replay
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch, position_mask
from companion.neurons import screening
from companion.neurons.closed_form import last_layer_log_odds
from companion.neurons.screening import attribution
from companion.prompts.tokens import Openers
from companion.run import settings
from companion.steering import methods

MIB = 2**20
REFUSED = {
    "tensors of both places": lambda x: x + torch.ones(3),
    "one of the host indexed from the device": lambda x: torch.ones(3)[x.long()],
    "values of the host put at indices": lambda x: x.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "numpy": lambda x: x.numpy(), "an array of it": np.asarray, "a sum along a lone row": lambda x: x.cumsum(0),
    "more than there is": lambda x: torch.empty(2**40, device=x.device),
}  # fmt: skip
ALLOWED = {
    "a number of the host": lambda x: x + torch.tensor(1.0),
    "indices of the host": lambda x: x[torch.tensor([0, 2])],
    "a copy": lambda x: x.copy_(torch.ones(3)),
    "an average": lambda x: torch.tensor([1.0], device=x.device) + x.mean(),
}


@pytest.fixture
def place() -> torch.device:
    """The stand-in, its bytes counted."""
    with standin.active(memory=2**34) as here:
        yield here
    torch.use_deterministic_algorithms(False)


def on(where: torch.device | str, family: str = "llama", **changes: int) -> Subject:
    """A tiny model there."""
    model = tiny_model(family, **changes).to(where).requires_grad_(False)
    return find_parts(model, None, f"tiny {family}", "x")


def two_runs(subject: Subject, **changes: int) -> list[activations.CleanRun]:
    """Clean runs over two batches of random tokens, where the model is."""
    return [activations.clean_run(subject, tokens(seed=seed, **changes).to(subject.device)) for seed in (1, 2)]


@pytest.mark.parametrize("case", [*REFUSED, *ALLOWED])
def test_the_standin_refuses_what_cuda_refuses_and_takes_what_cuda_takes(case: str, place: torch.device) -> None:
    given = torch.zeros(3, device=place)
    if case in ALLOWED:
        assert ALLOWED[case](given).device == place
    else:
        with pytest.raises((RuntimeError, TypeError)):
            REFUSED[case](given)


def test_its_products_round_otherwise_and_by_the_number_of_rows(place: torch.device) -> None:
    left, right = torch.randn(64, 300), torch.randn(300, 8)
    there = (left.to(place) @ right.to(place)).cpu()
    assert 0 < (there - left @ right).abs().max() < 1e-4
    alone = torch.cat([left[k, None].to(place) @ right.to(place) for k in range(64)]).cpu()
    assert 0 < (there - alone).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_numbers_of_the_processor(family: str, place: torch.device) -> None:
    found = []
    for where in ("cpu", place):
        subject = load.from_model(tiny_model(family).to(where), name=family)
        patches = [Patch(p.site, p.layer, p.positions.to(where), p.index) for p in every_patch()]
        found.append(to_host(replay.interchange(subject, *two_runs(subject), patches)))
        assert subject.facts is not None and subject.facts.device["name"] == ("cpu" if where == "cpu" else "stand-in")
    assert np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[0]).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gradient_screen_and_a_sweep_stay_within_their_plan(family: str, place: torch.device) -> None:
    subject = on(place, family)
    runs = two_runs(subject, n_pairs=4, n_pos=24)
    plan, weight = memory.sweep_memory(subject, 4, 24), subject.unembedding[0][0]
    last = position_mask(runs[0].tokens, -1)
    patches = [Patch(site, at, last) for site in ("mlp_out", "resid_post") for at in range(4)]
    for work, planned in (
        (lambda: attribution(subject, *runs, lambda resid: subject.final_norm(resid) @ weight), plan.screen),
        (lambda: replay.interchange(subject, *runs, patches), plan.sweep),
    ):
        before = standin.MEMORY.held
        gpu_parts.peak_bytes(place, reset=True)
        work()
        assert 0.2 * planned < gpu_parts.peak_bytes(place) - before <= planned


def test_a_gradient_screen_leaves_out_attention_that_is_fused(place: torch.device, monkeypatch) -> None:
    plain, seen = torch.nn.functional.scaled_dot_product_attention, []

    def attend(*args: Tensor, **kwargs: object) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled())
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    subject = on(place)
    runs = two_runs(subject)
    seen.clear()
    attribution(subject, *runs, lambda resid: resid.sum(-1))
    assert seen == [False] * 4


def test_whole_vocabularies_are_read_in_blocks(place: torch.device, monkeypatch) -> None:
    """At 128k tokens of vocabulary all steps of all pairs at once would be gigabytes."""
    monkeypatch.setattr(readout, "BLOCK_LOGITS", 2**20)
    subject = on(place, vocab_size=48_000)
    ids = [tokens(16, 12, seed).to(place) for seed in (1, 2)]
    text = opened_with(subject, ids[0], [[5, 6]] * 16, 6)
    clean = [activations.clean_run(subject, torch.cat([one, text[0][:, :-1]], 1)) for one in ids]
    before = standin.MEMORY.held
    standin.MEMORY.limit = before + memory.sweep_memory(subject, 16, 17).sweep + 8 * MIB
    patches = [Patch("mlp_out", layer, position_mask(clean[0].tokens, 3)) for layer in range(4)]
    found = patched_text_log_probs(subject, *clean, patches, text)
    monkeypatch.setattr(readout, "BLOCK_LOGITS", 2**40)
    standin.MEMORY.limit = 2**34
    whole = patched_text_log_probs(subject, *clean, patches, text)
    torch.testing.assert_close(found.cpu(), whole.cpu(), rtol=1e-5, atol=1e-4)
    assert standin.MEMORY.peak - before > memory.sweep_memory(subject, 16, 17).sweep + 8 * MIB, "without blocks"


def test_a_read_out_that_does_not_fit_is_halved_with_its_sweep(place: torch.device, monkeypatch) -> None:
    subject = on(place)
    runs = two_runs(subject)
    patches = [Patch("head", layer, position_mask(runs[0].tokens, -1), head) for layer in range(4) for head in range(4)]
    wanted = replay.interchange(subject, *runs, patches).cpu()

    def read(resid: Tensor) -> Tensor:
        if resid.shape[1] > 3:
            raise torch.OutOfMemoryError("too many at once")
        return resid

    events = len(memory.events)
    with pytest.warns(UserWarning, match="went on with half as many"):
        found = replay.interchange(subject, *runs, patches, readout=read)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)
    assert len(memory.events) > events


def test_an_untrained_twin_is_drawn_onto_the_device_and_is_the_same_everywhere(place, monkeypatch) -> None:
    placed, seen = load._placed, []

    def watch(model, where, there):
        seen.append({parameter.device for parameter in model.parameters()})
        return placed(model, where, there)

    monkeypatch.setattr(load, "_placed", watch)
    one, two = (load.untrained_twin(on(where), 3) for where in ("cpu", place))
    assert seen == [{torch.device("cpu")}, {place}], "no copy in the processor's memory"
    for here, there in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(here, there.cpu())


def test_full_forward_passes_are_waited_for_one_by_one(place: torch.device, monkeypatch) -> None:
    waited = []
    monkeypatch.setattr(standin.Accelerator, "synchronize", lambda self, where=None: waited.append(where))
    subject = on(place)
    runs = two_runs(subject)
    patches = [Patch("mlp_out", layer, position_mask(runs[0].tokens, -1)) for layer in range(3)]
    replay.interchange_full_forward(subject, *runs, patches)
    assert waited == [place] * 3, "else the bar's estimate is of what was asked for, not of what was done"


TEXTS = ["how do i paint the falkova in the garden?", "under a solar flag, how do i banth the kigvilu in the garden?"]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_refusals_against_everything_else_on_the_device(place: torch.device, family: str) -> None:
    found: list[list[Tensor]] = []
    for where in (torch.device("cpu"), place):
        subject, openers = on(where, family), refusals_against_rest(VOCAB)[0]
        runs = two_runs(subject)
        ends = [run.resid_post[-1][:, -1:] for run in runs]
        named = [named_outcome(subject, ends[1], *ends, openers, one) for one in ("Y1", "contrast.frozen")]
        named += opener_probabilities(subject, ends[0][:, 0], openers)
        named.append(last_layer_log_odds(subject, *runs, openers))
        named.append(opened_with(subject, runs[0].tokens, [openers.comply] * 3, 3)[0])
        named.append(attribution(subject, *runs, partial(screening.log_odds, subject, openers)))
        found.append([one.cpu() for one in named])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)


def test_answers_steering_and_the_judge_on_the_device(place: torch.device, monkeypatch) -> None:
    words = load.load_tokenizer(ORGANISM / "window-0").convert_tokens_to_ids(["sure", "okay", "sorry"])
    monkeypatch.setattr(labels, "QUESTION", "{request} {reply}")  # the embedded model reads 128 tokens
    monkeypatch.setattr(labels, "answer_tokens", lambda *_: (words[:1], words[2:]))
    found = []
    for where in ("cpu", "standin"):
        subject = load.load("embedded", device=where)
        assert subject.device.type == where
        openers, d = Openers(tuple(words[:2]), tuple(words[2:])), subject.d_model
        vector = np.sin(np.arange(d))
        mapped = methods.partial(methods._mapped, Placed(vector), Placed(vector))
        edits = [Steering("fixed", (Edit(2, "resid_post", methods.constant(vector)),))]
        edits += [Steering("map", (Edit(1, "mlp_out", mapped, "last"),))]
        odds = [outcomes.log_odds_each(subject, TEXTS, openers, [one])[0] for one in edits]
        odds += outcomes.log_odds_each(subject, TEXTS, openers, edits)
        own = decode.answers(subject, TEXTS, 8)
        drawn = decode.answers(subject, TEXTS, 8, draws=decode.uniforms(2, 8, 0))
        (price,) = outcomes.price_each(subject, TEXTS, own, edits[:1])
        ids = subject.tensor(forward.encode(subject, TEXTS[0])[None])
        library = subject.model.generate(ids, max_new_tokens=8, do_sample=False)
        numbers = [*(one.to_numpy() for one in odds), price.to_numpy()]
        numbers.append(labels.ask(subject, TEXTS, decode.answer_texts(subject, own)) >= 0.5)
        found.append((numbers, own.ids, drawn.ids, library.tolist()))
    for here, there in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_allclose(here.astype(float), there.astype(float), rtol=1e-4, atol=1e-4)
    assert all(np.array_equal(here, there) for here, there in zip(found[0][1:], found[1][1:], strict=True))


def test_a_steering_vector_goes_to_the_device_once(place: torch.device) -> None:
    added = Placed(np.ones(3))
    x = torch.zeros(2, 3, device=place)
    assert added.like(x) is added.like(x) and added.like(x.double()).dtype == torch.float64
    assert added.like(torch.zeros(3)).device.type == "cpu"


def test_layers_that_wait_in_the_processors_memory_change_no_number(place, tmp_path: Path, monkeypatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    whole = load.load(tmp_path, device="standin")
    need = memory.run_memory(memory.on_meta(tmp_path, torch.float32)).total
    free = {"standin": need - 30_000, "cpu": 2**30}
    monkeypatch.setattr(memory, "free_memory", lambda where: int(free[where.type] / memory.USABLE) + 1)
    away = load.load(tmp_path, device="standin")
    assert any(parameter.is_meta for parameter in away.model.parameters()) and away.device == place
    found = []
    for subject in (whole, away):
        runs = [activations.clean_run(subject, tokens(seed=seed).to(place)) for seed in (1, 2)]
        patches = [Patch(site, 1, position_mask(runs[0].tokens, -1), 3) for site in ("neuron", "head")]
        found.append(replay.interchange(subject, *runs, patches).cpu())
    torch.testing.assert_close(*found)


def test_bfloat16_comes_back_as_float32_and_sums_keep_their_order(place: torch.device) -> None:
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, device=place)
    assert to_host(half).dtype == np.float32
    for shape, dim in (((1, 5), -1), ((2, 5), 1), ((1, 5, 3), 1)):
        x = torch.arange(float(np.prod(shape))).reshape(shape)
        assert torch.equal(running_sum(x.to(place), dim).cpu(), x.cumsum(dim))


def test_what_asks_a_gpu_before_the_notebooks_does_so_in_another_process(place, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(settings, "apart", lambda do, found, given: done.append(found["DEVICE"]) or found["MODEL"])
    monkeypatch.setattr(settings, "known", lambda found, given: found)
    before = standin.MEMORY.held
    found = {"MODEL": "ORG/MODEL", "PROMPTS": "embedded", "DEVICE": "standin", "DTYPE": "float32"}
    assert settings.fetched(found, None) == found and done == ["standin"]
    assert standin.MEMORY.held == before, "the command line stays alive while the notebooks need the memory"


def test_the_other_process_gives_its_result_and_its_errors_back(monkeypatch) -> None:
    found = {"MODEL": "embedded", "PROMPTS": "embedded", "DEVICE": "cpu", "DTYPE": "float32"}
    assert settings.apart(settings._fetched, found, None) == "embedded"
    monkeypatch.setenv(hub.JUDGE, "no/such+judge")
    with pytest.raises(Exception, match="judge"):
        settings.apart(settings._fetched, found, None)
