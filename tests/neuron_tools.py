"""Small studies of neurons: tiny random models with pairs in every split, and ends of runs that are set by hand."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from effect_tools import YES_NO, said
from families import VOCAB, tiny_subject
from handmade import cue_pairs, random_pairs
from torch import Tensor

from companion.mediation import estimands
from companion.mediation.estimands import Batch
from companion.mediation.study import Study
from companion.model import replay
from companion.model.architecture import Subject
from companion.model.interventions import Patch
from companion.neurons.sets import Measured
from companion.neurons.single import FinalStates, PairEffects

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
    return Study("tiny", tiny_subject(family, dtype), tuple(pairs), dict.fromkeys(treatments, YES_NO), twins, {})


def cue_study(subject: Subject, n: int = 6) -> Study:
    """A compiled model with pairs that differ in cue A alone."""
    pairs = cue_pairs(subject.tokenizer, "off low", "on low", n=n)
    return Study("compiled", subject, tuple(pairs), {"T2": said(subject)}, {}, {})


def clean_batch(study: Study, treatment: str = "T2") -> Batch:
    """Both clean runs of a tiny study's pairs, which all have one length."""
    return estimands.run_clean(study.subject, estimands.batches(study.of(treatment), study.subject)[0])


def neuron_patches(batch: Batch, columns: list[Column]) -> list[Patch]:
    """An intervention on the last token for each (layer, neuron or neurons)."""
    last = torch.zeros_like(batch.control.tokens, dtype=torch.bool)
    last[:, -1] = True
    return [Patch("neuron", layer, last, neuron) for layer, neuron in columns]


def patched(study: Study, batch: Batch, columns: list[Column]) -> Tensor:
    """Final residual streams of the control runs after each intervention on its own, (pair, patch, d)."""
    return replay.interchange(study.subject, batch.control, batch.treated, neuron_patches(batch, columns))[:, :, 0]


def read_neurons(
    subject: Subject, ids: Tensor, layer: int, edit: Callable[[Tensor], None] = lambda inputs: None
) -> tuple[Tensor, Tensor]:
    """Logits of a plain forward pass, and what one down projection was given, (pair, pos, neuron); `edit` changes it in place."""
    seen: list[Tensor] = []

    def hook(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].clone())
        edit(seen[0])
        return (seen[0], *args[1:])

    handle = subject.layers[layer].down_proj.register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = subject.model(ids).logits
    handle.remove()
    return logits, seen[0]


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
    effects = made_effects(np.tile(writes, (n, 1)).astype(float), subject.n_layers - 1)
    effects = replace(effects, pairs=pairs)
    study = Study("made", subject, (), {"T2": YES_NO}, {}, {})
    return subject, Measured(study, {"T2": effects}, {"T2": FinalStates("T2", pairs, YES_NO, resid, neurons)})
