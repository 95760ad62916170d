"""Neurons of large models: a gradient estimate for all of them, and an exact recheck of the top and of a random sample.

How far the estimate can be trusted is measured on the recheck, every time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from companion.base.device import to_host
from companion.base.display import progress
from companion.mediation import estimands
from companion.mediation.study import Study
from companion.model.activations import CleanRun, on_input, on_output
from companion.model.architecture import Subject
from companion.model.interventions import projection
from companion.neurons.single import NEURONS, PairEffects, all_neurons, in_split, sign_on_discover
from companion.prompts.tokens import Openers, TokenPair

EXACT_LIMIT = 1 << 14  # neurons in all layers together that are measured one by one
RECHECKED = {False: 500, True: 50}  # neurons of the top, and as many random ones; fewer where each pair is costly
RECHECKED_SMOKE = 10  # the same in the smoke profile of a costly study


def attribution(
    subject: Subject, base: CleanRun, source: CleanRun, contrast: Callable[[Tensor], Tensor]
) -> Float[Tensor, "pair layer neuron"]:
    """First-order estimate of every last-token neuron's total effect: gradient at the base run times the difference.

    `contrast` turns final residuals at the last token, (pair, d), into one number a pair, differentiably. Good where
    effects are nearly linear: always recheck the top, and a random sample. Source: attribution patching (Nanda 2023;
    Syed et al. 2023, arXiv 2310.10348).
    """
    neurons, final = list[Tensor](), list[Tensor]()

    def keep(tensor: Tensor) -> None:
        tensor.retain_grad()
        neurons.append(tensor)

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if subject.device.type != "cpu":  # fused attention sums its gradient in the order in which parts of it are done
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        embedding = subject.model.get_input_embeddings()
        stack.enter_context(on_output(embedding, lambda out: out.detach().requires_grad_()))
        for parts in subject.layers:
            stack.enter_context(on_input(projection(parts, "neuron"), keep))
        stack.enter_context(on_input(subject.final_norm, final.append))
        subject.model.base_model(input_ids=base.tokens, use_cache=False)
        contrast(final[0][:, -1]).sum().backward()
    changes = (source.site("neuron", at)[:, -1] - base.site("neuron", at)[:, -1] for at in range(subject.n_layers))
    grads = (tensor.grad[:, -1] for tensor in neurons if tensor.grad is not None)
    return torch.stack([grad * change for grad, change in zip(grads, changes, strict=True)], dim=1)


def is_small(subject: Subject) -> bool:
    """Whether every neuron of every layer is measured exactly: a pure function of the model's shape."""
    return subject.n_layers * subject.d_mlp <= EXACT_LIMIT


def estimates(study: Study, treatment: str) -> pd.DataFrame:
    """Gradient estimate of the mean NIE on discover of every neuron: layer, neuron, estimate (log-odds, not signed).

    The estimate of NIE0 is taken at the control run and that of NIE1 at the treated run, and the two are averaged; for
    T2 - T2b those of the twins are subtracted.
    """
    pairs = [pair for pair in study.of(treatment.removesuffix("-T2b")) if pair.pair.split == "discover"]
    total = _mean_estimate(study, pairs)
    if treatment.endswith("-T2b"):
        by_id = {pair.pair.id: pair for pair in study.of("T2b")}
        twins = [by_id[twin] for pair in pairs if (twin := study.twins.get(pair.pair.id, "")) in by_id]
        total = total - _mean_estimate(study, twins)
    return all_neurons(study.subject).assign(estimate=total.reshape(-1))


def _mean_estimate(study: Study, pairs: list[TokenPair]) -> Float[np.ndarray, "layer neuron"]:
    subject, total = study.subject, np.zeros((study.subject.n_layers, study.subject.d_mlp))
    for group in progress(estimands.batches(pairs, subject), desc="gradient screen"):
        batch = estimands.run_clean(subject, group)
        y1 = partial(log_odds, subject, study.openers[group[0].pair.treatment])
        for base, source, sign in ((batch.control, batch.treated, 1), (batch.treated, batch.control, -1)):
            total += sign * to_host(attribution(subject, base, source, y1).double().sum(0)) / 2
    return total / len(pairs)


def log_odds(subject: Subject, openers: Openers, resid: Float[Tensor, "pair d"]) -> Float[Tensor, "pair"]:
    """Y1 as `outcomes.log_odds` computes it, but with gradients."""
    weight, bias = subject.unembedding
    rows = slice(None) if openers.rest else subject.tensor(openers.comply + openers.refuse)
    logits = nn.functional.linear(subject.final_norm(resid), weight[rows], None if bias is None else bias[rows])
    if subject.soft_cap is not None:
        logits = subject.soft_cap * torch.tanh(logits / subject.soft_cap)
    if openers.rest:
        logits, refuse = logits.double(), subject.tensor(openers.refuse)
        return logits.index_fill(-1, refuse, -torch.inf).logsumexp(-1) - logits[:, refuse].logsumexp(-1)
    n_comply = len(openers.comply)
    return logits[:, :n_comply].logsumexp(-1) - logits[:, n_comply:].logsumexp(-1)


def below_the_last(study: Study, treatment: str) -> pd.DataFrame:
    """`estimates` of the layers below the last that a difference can have reached; the last layer needs none."""
    found = estimates(study, treatment)
    is_live = found.estimate.abs().groupby(found.layer).transform("max") > 0
    return found[is_live & (found.layer < study.subject.n_layers - 1)].reset_index(drop=True)


def estimate_rows(below: pd.DataFrame, chosen: pd.DataFrame, effects: PairEffects) -> pd.DataFrame:
    """Rows of a neuron table for neurons that were not rechecked: the estimate on discover, signed, without an interval."""
    keys, sign = ["layer", "neuron"], sign_on_discover(effects.pairs)
    others = below[~pd.MultiIndex.from_frame(below[keys]).isin(pd.MultiIndex.from_frame(chosen[keys]))]
    te, size = sign * in_split(effects, "discover").pairs.te.mean(), sign * others.estimate
    return others.assign(
        treatment=effects.treatment, split="discover", te=te, nie0=size, nie1=size,
        direct=np.nan, ci_low=-np.inf, ci_high=np.inf, q_value=1.0, exact=False,
    )[NEURONS]  # fmt: skip


def to_recheck(found: pd.DataFrame, top: int, random: int) -> pd.DataFrame:
    """The neurons with the largest |estimate| and some random ones of the others: layer, neuron, `is_top`."""
    order = found.estimate.abs().sort_values(ascending=False, kind="stable").index
    others = np.random.default_rng(0).permutation(order[top:])[:random]
    chosen = found.loc[[*order[:top], *others]].reset_index(drop=True)
    return chosen.assign(is_top=np.arange(len(chosen)) < min(top, len(found)))


def screen_trust(chosen: pd.DataFrame, exact: PairEffects, n_neurons: int, top: int = 100) -> pd.Series:
    """How good the screen was, by the exact effects of the rechecked neurons on discover: "rank correlation" and "recall".

    `chosen` is `to_recheck`'s table, `exact` has the same columns. The correlation (Spearman, of sizes) is over the random
    sample. Recall is of the `top` largest exact effects: how many the screen's top holds, against an estimate of how many
    it missed (random neurons at least as large as the smallest of those, each standing for many).
    """
    size, is_top = abs(in_split(exact, "discover").nie.mean(0)), chosen.is_top.to_numpy()
    sample = is_top if is_top.all() else ~is_top
    held = np.sort(size[is_top])[::-1][:top]
    weight = (n_neurons - is_top.sum()) / max(1, (~is_top).sum())
    missed = weight * ((size[~is_top] >= held[-1]) & (size[~is_top] > 0)).sum()
    correlation = st.spearmanr(chosen.estimate.abs()[sample], size[sample]).statistic
    return pd.Series({"rank correlation": correlation, "recall": len(held) / (len(held) + missed)})
