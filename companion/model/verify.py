"""The check of every model before it is used: are its sites what they are called, and does the grid replay it exactly?

Every comparison is written so that NaN fails it.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from companion.base.errors import InputError
from companion.model import reference, replay
from companion.model.activations import CleanRun, clean_run
from companion.model.architecture import Subject
from companion.model.interventions import Patch, position_mask, projection
from companion.model.readout import logits

# Share of the largest compared value; the library's float64 casts to float32 inside its norms.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
N_POS = 10
_UNKNOWN = (
    "its blocks are put together in a way that companion/model/architecture.py "
    "does not know; add the family's names there"
)
SLOW_HINT = "load it with allow_slow=True to use one full forward pass per intervention instead"


@torch.no_grad()
def verify(subject: Subject) -> None:
    """Compares kept activations and replayed interventions with the plain library, on random tokens.

    Raises:
        InputError: a site is not what its name says (residual identity, logits), or the grid cannot replay the model.
    """
    base, source = clean_pair(subject)
    check_sites(subject, base)
    reason = grid_refusal(subject)
    if reason is not None:
        raise InputError(f"{subject.name}: {reason}, or {SLOW_HINT}")
    check_replay(subject, base, source)


def clean_pair(subject: Subject) -> tuple[CleanRun, CleanRun]:
    """Clean runs over two batches of random tokens."""
    return clean_run(subject, _tokens(subject, 0)), clean_run(subject, _tokens(subject, 1))


def grid_refusal(subject: Subject) -> str | None:
    """Why the grid does not serve this kind of model, and what to do; None if it may."""
    implementation = subject.model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        return (
            f"attention {implementation!r} takes no mask that the grid can cut to cells; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if any(parts.down_proj is None for parts in subject.layers):
        return "mixtures of experts are not replayed yet; use a dense model"
    return None


@torch.no_grad()
def check_sites(subject: Subject, run: CleanRun) -> None:
    """Every hook fired, the block's sum is the residual stream, projections reproduce outputs, logits are the library's."""
    for site in ("resid_post", "attn_out", "mlp_out", "head") + (("neuron",) if subject.d_mlp else ()):
        n_seen = len(run.kept(site))
        if n_seen != subject.n_layers:
            raise InputError(f"{subject.name}: {site} was seen in {n_seen} of {subject.n_layers} layers; {_UNKNOWN}")
    for layer in range(subject.n_layers):
        total = run.resid_pre[layer] + run.attn_out[layer] + run.mlp_out[layer]
        what = f"resid_pre + attn_out + mlp_out is not resid_post in layer {layer}"
        _same(subject, total, run.resid_post[layer], what)
        _check_projections(subject, run, layer)
    plain = subject.model(input_ids=run.tokens, use_cache=False).logits
    what = "final norm and unembedding do not give the model's logits"
    _same(subject, logits(subject, run.resid_post[-1]), plain, what)


def check_replay(subject: Subject, base: CleanRun, source: CleanRun) -> None:
    """Interventions at every site and at about four layers, against one full forward pass each."""
    patches = [
        Patch(site, layer, position_mask(base.tokens, column), 0 if site in ("head", "neuron") else None)
        for layer in range(0, subject.n_layers, max(1, subject.n_layers // 4))
        for site, column in (("resid_post", 1), ("attn_out", -1), ("mlp_out", 4), ("head", 2), ("neuron", -1))
    ]
    fast = replay.interchange(subject, base, source, patches)
    plain = reference.interchange_full_forward(subject, base, source, patches)
    _same(subject, fast, plain, "a replay of its layers differs from the model itself", SLOW_HINT)


def _check_projections(subject: Subject, run: CleanRun, layer: int) -> None:
    parts = subject.layers[layer]
    for site, post, out in (("head", parts.attn_post, "attn_out"), ("neuron", parts.mlp_post, "mlp_out")):
        if site == "neuron" and parts.down_proj is None:
            continue
        made = projection(parts, site)(run.site(site, layer))
        made = made if post is None else post(made)
        _same(subject, made, run.site(out, layer), f"{site} entries do not project to {out} in layer {layer}")


def _same(subject: Subject, got: Tensor, wanted: Tensor, what: str, hint: str = _UNKNOWN) -> None:
    difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= TOLERANCE[subject.dtype] * scale:
        raise InputError(f"{subject.name}: {what} (off by {difference:.1e} of {scale:.1e}); {hint}")


def _tokens(subject: Subject, seed: int) -> Int[Tensor, "pair pos"]:
    vocabulary = subject.model.get_input_embeddings().num_embeddings
    drawn = torch.randint(0, vocabulary, (2, N_POS), generator=torch.Generator().manual_seed(seed))
    return drawn.to(subject.device)
