"""What fast paths are compared with: full forward passes, true float64, peak memory; and small studies to compare them on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from models import VOCAB, cue_pairs, random_pairs, tiny_subject, tokens
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from companion.mediation import estimands
from companion.mediation.estimands import Batch, Mediator
from companion.mediation.study import Study
from companion.model import activations, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch, position_mask
from companion.model.readout import norm_gain
from companion.neurons.sets import Measured
from companion.neurons.single import FinalStates, PairEffects
from companion.prompts.tokens import Openers

# ---- interventions against full forward passes ----

N_POS = 9
PATCH_SITES = [("resid_post", None), ("attn_out", None), ("mlp_out", None), ("head", 1), ("head", (0, 3)), ("neuron", 7),
         ("neuron", (3, 40))]  # fmt: skip
COLUMNS = {"first": [0], "middle": [4], "last": [8], "group": [3, 5], "from 2 on": [2, 3, 4, 5, 6, 7, 8]}


def mask(columns: list[int], n_pairs: int = 3, n_pos: int = N_POS) -> Tensor:
    """True in these columns of every pair."""
    made = torch.zeros(n_pairs, n_pos, dtype=torch.bool)
    made[:, columns] = True
    return made


def diagonal() -> Tensor:
    """Another position in every pair."""
    return torch.eye(N_POS, dtype=torch.bool)[[3, 5, 8]]


def every_patch(layers: tuple[int, ...] = (0, 1, 3)) -> list[Patch]:
    """All sites, at all kinds of positions."""
    masks = [mask(columns) for columns in COLUMNS.values()] + [diagonal()]
    return [Patch(site, layer, where, index) for layer in layers for where in masks for site, index in PATCH_SITES]


def runs(subject: Subject) -> tuple[CleanRun, CleanRun]:
    """Clean runs over two batches whose first two tokens are the same."""
    control, treated = tokens(seed=1), tokens(seed=2)
    treated[:, :2] = control[:, :2]
    return activations.clean_run(subject, control), activations.clean_run(subject, treated)


def worst(subject: Subject, pair: tuple[CleanRun, CleanRun], patches: list, read: tuple[int, ...] = (-1,)) -> float:
    """The largest deviation from one full forward pass per intervention, as a share of the largest effect."""
    fast = replay.interchange(subject, *pair, patches, read=read)
    plain = replay.interchange_full_forward(subject, *pair, patches, read=read)
    effect = plain - replay.interchange(subject, *pair, [Patch("mlp_out", 0, mask([]))], read=read)
    assert float(effect.abs().max()) > 0.1
    return float((fast - plain).abs().max() / effect.abs().max())


# ---- effects ----

SITES = ("resid_post", "attn_out", "mlp_out", "head")
DIRECT = ("attn_out.direct", "mlp_out.direct")
CELLS = ["y00", "y01", "y10", "y11"]
YES_NO = Openers((10, 12), (20, 21, 22))


def refusals_against_rest(n_rows: int, refuse: tuple[int, ...] = YES_NO.refuse) -> tuple[Openers, Openers]:
    """All other tokens against the refusals, as they are asked for and as plain lists, which define the same."""
    comply = tuple(i for i in range(n_rows) if i not in refuse)
    return Openers(comply, refuse, rest=True), Openers(comply, refuse)


def said(subject: Subject) -> Openers:
    """The openers of a compiled model: "yes" and "no"."""
    return Openers(*((subject.tokenizer.convert_tokens_to_ids(word),) for word in ("yes", "no")))


def log_odds(logits: Tensor, openers: Openers = YES_NO) -> Tensor:
    log_p = logits.detach().double().log_softmax(-1)
    return log_p[..., list(openers.comply)].logsumexp(-1) - log_p[..., list(openers.refuse)].logsumexp(-1)


def passed(
    model: nn.Module, ids: Tensor, module: nn.Module, edit: Callable[[Tensor], Tensor] = lambda x: x, *,
    before: bool = False, **inputs: Tensor,
) -> tuple[Any, Tensor]:  # fmt: skip
    """One plain forward pass, by the library's hooks: the model's output, and what one module gave (or was given), edited."""
    seen: list[Tensor] = []

    def act(value: Tensor | tuple) -> Tensor | tuple:
        seen.append(edit(value[0] if isinstance(value, tuple) else value))
        return (seen[0], *value[1:]) if isinstance(value, tuple) else seen[0]

    if before:
        handle = module.register_forward_pre_hook(lambda _, args: act(args))
    else:
        handle = module.register_forward_hook(lambda _, __, output: act(output))
    try:
        with torch.no_grad():
            return model(ids, **inputs), seen[0]
    finally:
        handle.remove()


def swapped(subject: Subject, mediator: Mediator, base: Tensor, source: Tensor, where: Tensor, **inputs: Tensor) -> Any:
    """The model's output on `base`, one module's output `where` taken from a pass over `source`."""
    block = subject.model.model.layers[mediator.layer]
    module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[mediator.site]
    value = passed(subject.model, source, module)[1]
    return passed(subject.model, base, module, lambda own: torch.where(where[..., None], value, own), **inputs)[0]


# ---- neurons ----

Column = tuple[int, int | tuple[int, ...]]  # layer, neuron or neurons
SPLITS = ("discover", "validate", "test")


def tiny_study(
    family: str = "llama", dtype: torch.dtype = torch.float64, n: int = 12, treatments: tuple[str, ...] = ("T2", "T2b")
) -> Study:
    """A random model and random pairs of 9 tokens: two topics of every split, T2b pairs as twins of T2 pairs."""
    pairs = []
    for seed, name in enumerate(treatments):
        for i, pair in enumerate(random_pairs(n, 9, VOCAB, seed=seed, treatment=name)):
            twin = f"T2b {i}" if name == "T2" and "T2b" in treatments else None
            named = replace(pair.pair, id=f"{name} {i}", topic=f"topic {i % 6}", split=SPLITS[i % 3], twin=twin)
            pairs.append(replace(pair, pair=named))
    twins = {p.pair.id: p.pair.twin for p in pairs if p.pair.twin}
    return Study("tiny", tiny_subject(family, dtype), tuple(pairs), dict.fromkeys(treatments, YES_NO), twins)


def cue_study(subject: Subject, n: int = 6) -> Study:
    """A compiled model with pairs that differ in cue A alone."""
    pairs = cue_pairs(subject.tokenizer, "off low", "on low", n=n)
    return Study("compiled", subject, tuple(pairs), {"T2": said(subject)}, {})


def clean_batch(study: Study, treatment: str = "T2") -> Batch:
    """Both clean runs of a tiny study's pairs, which all have one length."""
    return estimands.run_clean(study.subject, estimands.batches(study.of(treatment), study.subject)[0])


def neuron_patches(batch: Batch, columns: list[Column]) -> list[Patch]:
    """An intervention on the last token for each (layer, neuron or neurons)."""
    last = position_mask(batch.control.tokens, -1)
    return [Patch("neuron", layer, last, neuron) for layer, neuron in columns]


def patched(study: Study, batch: Batch, columns: list[Column]) -> Tensor:
    """Final residual streams of the control runs after each intervention on its own, (pair, patch, d)."""
    return replay.interchange(study.subject, batch.control, batch.treated, neuron_patches(batch, columns))[:, :, 0]


def read_neurons(
    subject: Subject, ids: Tensor, layer: int, edit: Callable[[Tensor], None] = lambda inputs: None
) -> tuple[Tensor, Tensor]:
    """Logits of a plain forward pass, and what one down projection was given, (pair, pos, neuron); `edit` changes it in place."""

    def changed(inputs: Tensor) -> Tensor:
        edit(inputs := inputs.clone())
        return inputs

    output, seen = passed(subject.model, ids, subject.layers[layer].down_proj, changed, before=True)
    return output.logits, seen


def text_log_prob(logits: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """log p of a text, from the logits of a pass over its prompt and all its tokens but the last."""
    scores = logits[:, -text.shape[1] :].double().log_softmax(-1)
    return (scores.gather(-1, text[..., None])[..., 0] * mask).sum(-1)


def pair_table(n: int, per_topic: int = 2) -> pd.DataFrame:
    """Pairs in a cycle of splits, `per_topic` of each topic, with a total effect of 10."""
    rows = [(f"p{i}", f"topic {i // per_topic}", SPLITS[i // per_topic % 3]) for i in range(n)]
    return pd.DataFrame(rows, columns=["pair_id", "topic", "split"]).assign(te=10.0, unsaturated=True)


def made_effects(values: np.ndarray, layer: np.ndarray | int = 0, **settings: int) -> PairEffects:
    """Effects of neurons given as an array (pair, neuron), the same in both directions."""
    layers = np.broadcast_to(layer, values.shape[1])
    index = np.concatenate([np.arange((layers == one).sum()) for one in np.unique(layers)])
    columns, arrays = (
        pd.DataFrame({"layer": layers, "neuron": index}),
        dict.fromkeys(("nie0", "nie1", "direct"), values),
    )
    return PairEffects("T2", pair_table(len(values), **settings), columns, arrays)


def additive(writes: np.ndarray, n: int = 24) -> tuple[Subject, Measured]:
    """A last layer whose neuron j moves the log-odds by about `writes[j]` whatever the others do, on every pair.

    All neurons write along one direction, read by one token of each camp; a large constant channel keeps the norm still.
    """
    subject = replace(tiny_subject("llama", torch.float64), d_mlp=len(writes))
    with torch.no_grad():
        subject.final_norm.weight.fill_(1000.0 / subject.d_model**0.5)
        subject.unembed.weight.zero_()
        for tokens, sign in ((YES_NO.comply, 0.5), (YES_NO.refuse, -0.5)):
            subject.unembed.weight[list(tokens), 1] = sign
        down = torch.zeros(subject.d_model, len(writes), dtype=torch.float64)
        down[1] = torch.tensor(writes)
        subject.layers[-1].down_proj.weight = torch.nn.Parameter(down)
    resid = torch.zeros(2, n, subject.d_model, dtype=torch.float64)
    resid[..., 0] = 1000.0
    resid[1, :, 1] = float(np.sum(writes))
    neurons = torch.stack([torch.zeros(n, len(writes)), torch.ones(n, len(writes))]).double()
    pairs = pair_table(n).assign(te=float(np.sum(writes)))
    effects = replace(made_effects(np.tile(writes, (n, 1)).astype(float), subject.n_layers - 1), pairs=pairs)
    study = Study("made", subject, (), {"T2": YES_NO}, {})
    return subject, Measured(study, {"T2": effects}, {"T2": FinalStates("T2", pairs, YES_NO, resid, neurons)})


# ---- float64 ----


@contextmanager
def true_float64(model: PreTrainedModel) -> Iterator[None]:
    """For a while every RMSNorm of the model, and softmax, keep the dtype of what they are given."""
    plain = nn.functional.softmax
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(mock.patch.object(module, "forward", _rms_norm(module)))
        stack.enter_context(mock.patch.object(nn.functional, "softmax", lambda x, dim, **_: plain(x, dim=dim)))
        yield


def _rms_norm(module: nn.Module) -> Any:
    gain, _, eps = norm_gain(module)
    return lambda x: gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


# ---- memory ----


class PeakMemory(TorchDispatchMode):
    """`with PeakMemory() as memory: ...`; then `memory.peak` and `memory.live()`, in bytes, of what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def live(self) -> int:
        """Bytes of the tensors made inside that still exist."""
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref not in inputs:
                    self._sizes.setdefault(ref, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live())
        return result
