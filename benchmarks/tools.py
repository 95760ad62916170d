"""The same interventions by six tools. Each is used as its own documentation advises, at its best setting found.

Given to all, cached beforehand and not timed: both clean runs, which every study needs. All pairs are one batch,
without gradients. Peers are timed as their documentation shows them (every token is unembedded) and unembedding only
what is read. Plain hooks and restart have a third setting: keys and values of all tokens before the patch, which cannot
change, come from the clean run. In tools that wrap the model that is not simple, so they are not given it.
"""

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from benchmarks.draw import OURS
from benchmarks.shapes import STEPS, Job
from companion.base.errors import InputError
from companion.mediation import outcomes
from companion.model import activations, replay
from companion.model.activations import CleanRun, at_positions, causal, first
from companion.model.architecture import Subject, written_vectors
from companion.model.interventions import Patch, head_width, on_site, projection
from companion.model.readout import logits, token_log_probs
from companion.neurons import closed_form

Run = Callable[[Sequence[Job]], Float[Tensor, "pair job number"]]
DOCUMENTED, LAST, CACHED = "every token", "read tokens", "read tokens, keys cached"


@dataclass(frozen=True)
class Setting:
    """What every tool is given. The logits of two vocabulary `rows` are compared, or an `answer` is scored behind the prompt.

    The prompts of both runs then have the answer, but for its last token, behind them. `how` is one of the three settings.
    """

    subject: Subject
    control: Int[Tensor, "pair pos"]
    base: CleanRun
    source: CleanRun
    log_prob: bool
    rows: tuple[int, int] = (0, 1)
    answer: Int[Tensor, "pair step"] | None = None
    how: str = LAST

    @property
    def reads(self) -> int:
        """How many tokens, counted from the end, are read."""
        return 1 if self.answer is None else STEPS

    @property
    def keep(self) -> dict[str, int]:
        """What is passed to the library so that it unembeds only what is read."""
        return {} if self.how == DOCUMENTED else {"logits_to_keep": self.reads}

    def cut(self, job: Job) -> int:
        """How many first tokens need not be computed, since their keys and values are given."""
        return job.positions[0] if self.how == CACHED else 0

    def cells(self, job: Job, cut: int = 0) -> tuple[slice, list[int], slice]:
        """Where the patched entries are in a site's tensor, without its first tokens."""
        width = head_width(self.subject, job.layer) if job.site == "head" else 1
        entries = slice(None) if job.index is None else slice(job.index * width, (job.index + 1) * width)
        return slice(None), [position - cut for position in job.positions], entries

    def new(self, job: Job) -> Tensor:
        """What a patch writes into these cells."""
        return self.source.site(job.site, job.layer)[self.cells(job)]

    def score(self, logits: Float[Tensor, "pair pos row"]) -> Float[Tensor, "pair number"]:
        """The answer's log-probability; or the two rows' logit difference and, if wanted, the first one's log-probability."""
        read = logits[:, -self.reads :]
        if self.answer is not None:
            return (read.gather(-1, self.answer[..., None])[..., 0] - read.logsumexp(-1)).sum(1, keepdim=True)
        one, other = (read[:, -1, row] for row in self.rows)
        return torch.stack([one - other, *([one - read[:, -1].logsumexp(-1)] if self.log_prob else [])], dim=-1)


def hooks(setting: Setting) -> Run:
    """PyTorch forward hooks on the library's model, written by hand; the patched tensor is edited in place."""
    model, layers = setting.subject.model, setting.subject.layers

    def run_one(job: Job) -> Tensor:
        cut, new = setting.cut(job), setting.new(job)
        cells, cache = setting.cells(job, cut), DynamicCache() if cut else None
        for layer, (keys, values) in enumerate(zip(setting.base.keys, setting.base.values, strict=True)):
            if cache is not None:
                cache.update(keys[:, :, :cut], values[:, :, :cut], layer)

        def edit(tensor: Tensor) -> None:
            tensor[cells] = new

        with on_site(layers[job.layer], job.site, edit):  # type: ignore[arg-type]
            return model(setting.control[:, cut:], past_key_values=cache, use_cache=cut > 0, **setting.keep).logits

    return _one_by_one(run_one, setting)


def restart(setting: Setting) -> Run:
    """Plain PyTorch that keeps the clean input of each layer and runs the model's own layers from the patched one on.

    The idea is not ours: it is `start_at_layer` of TransformerLens's HookedTransformer, and the layer caching of circuit
    discovery (auto-circuit). All positions of all pairs are computed, for one intervention at a time.
    """
    base, layers, norm = setting.base, setting.subject.layers, setting.subject.final_norm
    unembed = setting.subject.model.get_output_embeddings()

    def call(layer: int, cut: int) -> dict[str, Any]:
        """The library's own arguments to a layer, for the tokens that are computed."""
        made = dict(base.calls[layer])
        if cut:
            made = {name: at_positions(name, value, slice(cut, None)) for name, value in made.items()}
            mask = made.get("attention_mask")
            mask = causal(base.tokens.shape[1], base.tokens.device) if mask is None else mask
            before = replay.Prefix(base.keys[layer][:, :, :cut], base.values[layer][:, :, :cut])
            made |= {"attention_mask": mask[:, :, cut:], "past_key_values": before}
        return made

    def run_one(job: Job) -> Tensor:
        cut, new, is_above = setting.cut(job), setting.new(job), job.site == "resid_post"
        cells = setting.cells(job, cut)

        def edit(tensor: Tensor) -> None:
            tensor[cells] = new

        hidden = (base.resid_post if is_above else base.resid_pre)[job.layer][:, cut:].clone()
        if is_above:
            edit(hidden)
        with nullcontext() if is_above else on_site(layers[job.layer], job.site, edit):  # type: ignore[arg-type]
            for layer in range(job.layer + is_above, len(layers)):
                hidden = first(layers[layer].block(hidden, **call(layer, cut)))
        return unembed(norm(hidden[:, -setting.reads :]))

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
    """`run_with_hooks` of a TransformerBridge, as its patching module does it.

    `start_at_layer` of version 4 saves nothing: all layers below still run, and the given residual replaces their result.
    """
    lens = bridge(setting.subject)
    names = {"resid_post": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out",
             "neuron": "mlp.hook_post", "head": "attn.hook_z"}  # fmt: skip

    def run_one(job: Job) -> Tensor:
        new, cells = setting.new(job), setting.cells(job)

        def edit(value: Tensor, hook: Any) -> Tensor:
            value.flatten(2)[cells] = new  # heads have an axis of their own
            return value

        hook = (f"blocks.{job.layer}.{names[job.site]}", edit)
        return lens.run_with_hooks(setting.control, fwd_hooks=[hook], **setting.keep)

    return _one_by_one(run_one, setting)


def nnsight(setting: Setting) -> Run:
    """One trace an intervention, with an in-place edit."""
    from nnsight import NNsight

    wrapped = NNsight(_twin(setting.subject))

    def run_one(job: Job) -> Tensor:
        new, cells = setting.new(job), setting.cells(job)
        layer = wrapped.model.layers[job.layer]
        with wrapped.trace(input_ids=setting.control, use_cache=False, **setting.keep):
            if job.site == "neuron":
                layer.mlp.down_proj.input[cells] = new
            elif job.site == "head":
                layer.self_attn.o_proj.input[cells] = new
            elif job.site == "attn_out":
                layer.self_attn.output[0][cells] = new
            elif job.site == "mlp_out":
                layer.mlp.output[cells] = new
            else:
                layer.output[cells] = new
            logits = wrapped.output.logits.save()
        return logits  # noqa: RET504 - a trace does not return

    return _one_by_one(run_one, setting)


def pyvene(setting: Setting) -> Run:
    """One IntervenableModel an intervention, with the source's activation handed in."""
    import pyvene as pv

    model, n_pairs = _twin(setting.subject), len(setting.control)
    whole = {"resid_post": "block_output", "attn_out": "attention_output", "mlp_out": "mlp_output"}
    parts = {"neuron": "mlp.down_proj", "head": "self_attn.o_proj"}

    def run_one(job: Job) -> Tensor:
        component = whole.get(job.site) or f"model.layers[{job.layer}].{parts[job.site]}.input"
        places = job.positions
        config = pv.IntervenableConfig(
            [
                pv.RepresentationConfig(
                    job.layer, component, "pos", len(places), intervention_type=pv.VanillaIntervention
                )
            ]
        )
        wrapped = pv.IntervenableModel(config, model)
        wrapped.disable_model_gradients()
        source = setting.source.site(job.site, job.layer)
        entries = list(range(source.shape[-1]))[setting.cells(job)[2]]
        _, patched = wrapped(
            base={"input_ids": setting.control, **setting.keep},
            source_representations={wrapped.sorted_keys[0]: source[:, places].clone()},
            unit_locations={"sources->base": (None, [[places] * n_pairs])},
            subspaces=None if job.index is None else [[entries] * n_pairs],
            use_cache=False,
        )
        return patched.logits

    return _one_by_one(run_one, setting)


def companion(setting: Setting) -> Run:
    """The grid of this repository, called as the notebooks call it; last-layer neurons in closed form."""
    subject, runs = setting.subject, (setting.subject, setting.base, setting.source)
    rows, top = subject.tensor(list(setting.rows)), setting.subject.n_layers - 1

    def read(resid: Float[Tensor, "... d"]) -> Float[Tensor, "... number"]:
        both = logits(subject, resid, rows)
        said = [token_log_probs(subject, resid, rows[0].expand(resid.shape[:-1]))] if setting.log_prob else []
        return torch.stack([both[..., 0] - both[..., 1], *said], dim=-1)

    def last_layer() -> Float[Tensor, "pair neuron number"]:
        both = closed_form.last_layer_neurons(*runs, rows)
        said, change = [], (setting.source.site("neuron", top) - setting.base.site("neuron", top))[:, -1]
        if setting.log_prob:
            vectors = written_vectors(projection(subject.layers[top], "neuron"))
            resid = setting.base.resid_post[top][:, -1]
            against_rest = closed_form.written_log_odds(subject, resid, change, vectors, [int(rows[0])])
            said = [torch.nn.functional.logsigmoid(-against_rest)]
        return torch.stack([both[..., 0] - both[..., 1], *said], dim=-1)

    def run(jobs: Sequence[Job]) -> Tensor:
        last = setting.control.shape[1] - 1
        if setting.answer is None and {(j.site, j.layer, *j.positions) for j in jobs} == {
            ("neuron", jobs[0].layer, last)
        }:
            chosen = subject.tensor([job.index for job in jobs])
            if jobs[0].layer == top and closed_form.is_closed(subject):
                return last_layer()[:, chosen]
            return replay.each_neuron(*runs, jobs[0].layer, chosen, read)
        masks: dict[tuple[int, ...], Tensor] = {}
        for job in jobs:
            mask = masks.setdefault(tuple(job.positions), torch.zeros_like(setting.control, dtype=torch.bool))
            mask[:, job.positions] = True
        patches = [Patch(job.site, job.layer, masks[tuple(job.positions)], job.index) for job in jobs]
        if setting.answer is not None:
            text = setting.answer, torch.ones_like(setting.answer, dtype=torch.bool)
            return outcomes.patched_text_log_probs(*runs, patches, text)[..., None]
        return replay.interchange(*runs, patches, readout=read)[:, :, 0]

    return run


# What makes each tool's run, its package, and its settings.
TOOLS: dict[str, tuple[Callable[[Setting], Run], str, tuple[str, ...]]] = {
    OURS: (companion, "torch", (LAST,)),
    "plain hooks": (hooks, "torch", (DOCUMENTED, LAST, CACHED)),
    "restart from the layer": (restart, "torch", (LAST, CACHED)),
    "TransformerLens": (transformer_lens, "transformer_lens", (DOCUMENTED, LAST)),
    "nnsight": (nnsight, "nnsight", (DOCUMENTED, LAST)),
    "pyvene": (pyvene, "pyvene", (DOCUMENTED, LAST)),
}


def is_installed(package: str) -> bool:
    """True if the tool's package can be imported."""
    return importlib.util.find_spec(package) is not None


def setting_for(
    subject: Subject,
    control: Int[Tensor, "pair pos"],
    treated: Int[Tensor, "pair pos"],
    log_prob: bool,
    rows: tuple[int, int] = (0, 1),
    answer: Int[Tensor, "pair step"] | None = None,
) -> Setting:
    """Runs both prompts once, with the answer behind them if one is given, and keeps their sites."""
    if answer is not None:
        control, treated = (torch.cat([side, answer[:, :-1]], dim=1) for side in (control, treated))
    shared = activations.shared_prefix(subject, control, treated)
    base, source = (activations.clean_run(subject, side, shared=shared) for side in (control, treated))
    return Setting(subject, control, base, source, log_prob, rows, answer)


def clean_outcome(setting: Setting) -> Float[Tensor, "pair number"]:
    """The outcome of the control prompts with nothing patched."""
    with torch.no_grad():
        return setting.score(setting.subject.model(setting.control, use_cache=False, **setting.keep).logits)


def _twin(subject: Subject) -> nn.Module:
    """The same weights in modules of their own: some tools rewire the model that they are given."""
    return copy.deepcopy(subject.model, {id(tensor): tensor for tensor in subject.model.parameters()})


def _one_by_one(run_one: Callable[[Job], Tensor], setting: Setting) -> Run:
    @torch.no_grad()
    def run(jobs: Sequence[Job]) -> Tensor:
        return torch.stack([setting.score(run_one(job)) for job in jobs], dim=1)

    return run
