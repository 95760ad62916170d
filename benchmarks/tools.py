"""The same interventions by five tools. Each is used as its own documentation advises, at its best setting found.

Given to all, cached beforehand and not timed: both clean runs, which every study needs. All pairs are one batch,
without gradients. Each peer is timed twice: as its documentation shows it, and unembedding the last token only
(`last_only`), which halves the work where the vocabulary is large. What is timed is the interventions themselves.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer

from benchmarks.shapes import Job, outcome
from companion.base.errors import InputError
from companion.model import activations, load, replay
from companion.model.activations import CleanRun, on_input, on_output
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.model.readout import blocks_of_rows, logits
from companion.neurons import closed_form

Run = Callable[[Sequence[Job]], Float[Tensor, "pair job number"]]


@dataclass(frozen=True)
class Setting:
    """What every tool is given. The outcome compares vocabulary rows 0 and 1."""

    subject: Subject
    control: Int[Tensor, "pair pos"]
    treated: Int[Tensor, "pair pos"]
    base: CleanRun
    source: CleanRun
    log_prob: bool
    last_only: bool

    @property
    def keep(self) -> dict[str, int]:
        """What is passed to the library so that it unembeds the last token only."""
        return {"logits_to_keep": 1} if self.last_only else {}


def hooks(setting: Setting) -> Run:
    """PyTorch forward hooks on the library's model, written by hand; the patched tensor is edited in place."""
    model, layers = setting.subject.model, setting.subject.layers

    def run_one(job: Job) -> Tensor:
        parts, new = layers[job.layer], _source_value(setting.source, job)

        def edit(tensor: Tensor) -> None:
            _cells(tensor, job).copy_(new)

        with ExitStack() as stack:
            if job.site == "neuron":
                stack.enter_context(on_input(parts.down_proj, edit))  # type: ignore[arg-type]
            else:
                module = {"resid_post": parts.block, "attn_out": parts.attn, "mlp_out": parts.mlp}[job.site]
                stack.enter_context(on_output(module, edit))
            return model(setting.control, use_cache=False, **setting.keep).logits[:, -1]

    return _one_by_one(run_one, setting)


def bridge(subject: Subject) -> Any:
    """TransformerLens's view of the model (`TransformerBridge`).

    Booting rewires a model in place, so this is a twin that shares the weights and nothing else. It computes
    attention eagerly. Hooks on `hook_resid_mid` that return a new tensor miss the skip path: do not use them.
    """
    from transformer_lens.model_bridge import TransformerBridge  # four seconds

    if subject.tokenizer is None:
        raise InputError(f"{subject.name} has no tokenizer, and TransformerLens needs one; hand one to from_model")
    shared = {id(tensor): tensor for tensor in (*subject.model.parameters(), *subject.model.buffers())}
    twin = copy.deepcopy(subject.model, shared)
    twin.config.architectures = [type(subject.model).__name__]
    tokenizer = copy.deepcopy(subject.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        if not Path(tokenizer.name_or_path).is_dir():  # it is read again from there, and a GGUF file is no folder
            tokenizer.save_pretrained(scratch)
            tokenizer = AutoTokenizer.from_pretrained(scratch, local_files_only=True)
        return TransformerBridge.boot_transformers(
            tokenizer.name_or_path,
            hf_model=twin, tokenizer=tokenizer, device=str(subject.device), dtype=subject.dtype,
        )  # fmt: skip


def transformer_lens(setting: Setting) -> Run:
    """`run_with_hooks` of a TransformerBridge, as its patching module does it."""
    lens = bridge(setting.subject)
    names = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out",
             "neuron": "mlp.hook_post"}  # fmt: skip

    def run_one(job: Job) -> Tensor:
        new = _source_value(setting.source, job)

        def edit(value: Tensor, hook: Any) -> Tensor:
            _cells(value, job).copy_(new)
            return value

        hook = (f"blocks.{job.layer}.{names[job.site]}", edit)
        return lens.run_with_hooks(setting.control, fwd_hooks=[hook], **setting.keep)[:, -1]

    return _one_by_one(run_one, setting)


def nnsight(setting: Setting) -> Run:
    """One trace an intervention, with an in-place edit."""
    from nnsight import NNsight

    wrapped = NNsight(_twin(setting.subject))

    def run_one(job: Job) -> Tensor:
        new, position = _source_value(setting.source, job), job.position
        layer = wrapped.model.layers[job.layer]
        with wrapped.trace(input_ids=setting.control, use_cache=False, **setting.keep):
            if job.site == "neuron":
                layer.mlp.down_proj.input[:, position, job.index] = new
            elif job.site == "attn_out":
                layer.self_attn.output[0][:, position] = new
            elif job.site == "mlp_out":
                layer.mlp.output[:, position] = new
            else:
                layer.output[:, position] = new
            logits = wrapped.output.logits.save()
        return logits[:, -1]

    return _one_by_one(run_one, setting)


def pyvene(setting: Setting) -> Run:
    """One IntervenableModel an intervention, with the source's activation handed in."""
    import pyvene as pv

    model = _twin(setting.subject)
    components = {"resid_post": "block_output", "attn_out": "attention_output", "mlp_out": "mlp_output"}
    n_pairs = len(setting.control)

    def run_one(job: Job) -> Tensor:
        component = components.get(job.site, f"model.layers[{job.layer}].mlp.down_proj.input")
        config = pv.IntervenableConfig(
            [pv.RepresentationConfig(job.layer, component, "pos", 1, intervention_type=pv.VanillaIntervention)]
        )
        wrapped = pv.IntervenableModel(config, model)
        wrapped.disable_model_gradients()
        source = setting.source.site(job.site, job.layer)[:, job.position : job.position + 1].clone()
        _, patched = wrapped(
            base={"input_ids": setting.control, **setting.keep},
            source_representations={wrapped.sorted_keys[0]: source},
            unit_locations={"sources->base": (None, [[[job.position]] * n_pairs])},
            subspaces=None if job.index is None else [[[job.index]] * n_pairs],
            use_cache=False,
        )
        return patched.logits[:, -1]

    return _one_by_one(run_one, setting)


def companion(setting: Setting) -> Run:
    """The grid of this repository; last-layer neurons in closed form."""
    subject = setting.subject
    rows = torch.tensor([0, 1], device=subject.device)

    def run(jobs: Sequence[Job]) -> Tensor:
        if not setting.log_prob and all(job.site == "neuron" and job.layer == subject.n_layers - 1 for job in jobs):
            found = closed_form.last_layer_neurons(subject, setting.base, setting.source, rows)
            return outcome(found[:, [job.index for job in jobs]], False)

        def readout(resid: Tensor) -> Tensor:
            if setting.log_prob:
                return _difference_and_log_prob(_log_probs(subject, resid, rows))
            return outcome(logits(subject, resid, rows), False)

        patches = [Patch(job.site, job.layer, _mask(setting.control, job.position), job.index) for job in jobs]
        return replay.interchange(subject, setting.base, setting.source, patches, readout=readout)[:, :, 0]

    return run


TOOLS = {
    "plain hooks": (hooks, "torch"),
    "TransformerLens": (transformer_lens, "transformer_lens"),
    "nnsight": (nnsight, "nnsight"),
    "pyvene": (pyvene, "pyvene"),
    "this repository": (companion, "torch"),
}


def is_installed(package: str) -> bool:
    """True if the tool's package can be imported."""
    return importlib.util.find_spec(package) is not None


def setting_for(
    subject: Subject, control: Int[Tensor, "pair pos"], treated: Int[Tensor, "pair pos"], log_prob: bool
) -> Setting:
    """Runs both prompts once and keeps their sites."""
    base, source = activations.clean_run(subject, control), activations.clean_run(subject, treated)
    return Setting(subject, control, treated, base, source, log_prob, last_only=True)


def clean_outcome(setting: Setting) -> Float[Tensor, "pair number"]:
    """The outcome of the control prompts with nothing patched."""
    logits = setting.subject.model(setting.control, use_cache=False, logits_to_keep=1).logits[:, -1]
    return outcome(logits, setting.log_prob)


def make_subject(model: Any, folder: Path) -> Subject:
    """A checked subject with the tokenizer of a folder, which TransformerLens asks for."""
    from transformers import AutoTokenizer

    return load.from_model(model, AutoTokenizer.from_pretrained(folder), str(folder))


def _twin(subject: Subject) -> nn.Module:
    """The same weights in modules of their own: some tools rewire the model that they are given."""
    return copy.deepcopy(subject.model, {id(tensor): tensor for tensor in subject.model.parameters()})


def _one_by_one(run_one: Callable[[Job], Tensor], setting: Setting) -> Run:
    @torch.no_grad()
    def run(jobs: Sequence[Job]) -> Tensor:
        return torch.stack([outcome(run_one(job), setting.log_prob) for job in jobs], dim=1)

    return run


def _log_probs(subject: Subject, resid: Float[Tensor, "... d"], rows: Int[Tensor, "row"]) -> Float[Tensor, "... row"]:
    """Log-probabilities, in nats, of some tokens against the whole vocabulary, which is never alive all at once."""
    total = torch.full(resid.shape[:-1], -torch.inf, dtype=torch.float64, device=resid.device)
    for block in blocks_of_rows(subject, total.numel()):
        total = torch.logaddexp(total, logits(subject, resid, block).double().logsumexp(-1))
    return (logits(subject, resid, rows) - total[..., None]).to(resid.dtype)


def _difference_and_log_prob(log_probs: Float[Tensor, "... row"]) -> Float[Tensor, "... number"]:
    return torch.stack([log_probs[..., 0] - log_probs[..., 1], log_probs[..., 0]], dim=-1)


def _source_value(source: CleanRun, job: Job) -> Tensor:
    return _cells(source.site(job.site, job.layer), job)


def _cells(tensor: Tensor, job: Job) -> Tensor:
    cells = tensor[:, job.position]
    return cells if job.index is None else cells[:, job.index]


def _mask(tokens: Int[Tensor, "pair pos"], position: int) -> Tensor:
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, position] = True
    return mask
