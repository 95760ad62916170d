"""From the final residual stream to logits, with the needed vocabulary rows only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from companion.base.errors import InputError
from companion.model.activations import CleanRun
from companion.model.architecture import Subject

EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)  # of norms that do not say theirs
SMALL = 1e-3  # a scale at which epsilon matters
VOCABULARY_BLOCK = 1024  # rows of the unembedding whose logits fit into a processor's cache
BLOCK_LOGITS = 2**23  # alive together where a vocabulary is read block by block: below the `readout` of a memory plan


@torch.no_grad()
def logits(
    subject: Subject, resid: Float[Tensor, "... d"], rows: Int[Tensor, "row"] | None = None,
    norm_like: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "... row"]:  # fmt: skip
    """Final norm, unembedding of the wanted vocabulary rows (all if None), final soft cap.

    `norm_like` freezes the final norm's scale at that residual's: the result is linear in `resid`, up to the soft cap.
    """
    return _unembed(subject, _normed(subject, resid, norm_like), slice(None) if rows is None else rows)


@torch.no_grad()
def log_odds_against_rest(
    subject: Subject,
    resid: Float[Tensor, "... d"],
    rows: Sequence[int],
    norm_like: Float[Tensor, "... d"] | None = None,
) -> Float[Tensor, "..."]:
    """log p(any other token) - log p(any of these tokens), in log-odds (float64); the vocabulary is never alive all at once."""
    normed = _normed(subject, resid, norm_like)
    blocks = blocks_of_rows(subject, normed[..., 0].numel())
    return rest_against(((block.start, _unembed(subject, normed, block)) for block in blocks), rows)


@torch.no_grad()
def token_log_probs(
    subject: Subject, resid: Float[Tensor, "... d"], tokens: Int[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Log-probability of one token at each place, in nats (float64); the vocabulary is never alive all at once."""
    normed = _normed(subject, resid, None)
    own = torch.zeros(normed.shape[:-1], dtype=torch.float64, device=normed.device)
    total = torch.full_like(own, -torch.inf)
    for block in blocks_of_rows(subject, own.numel()):
        logits = _wide(_unembed(subject, normed, block))
        here = (tokens >= block.start) & (tokens < block.stop)
        at = (tokens - block.start).clamp(0, logits.shape[-1] - 1)
        own = torch.where(here, logits.gather(-1, at[..., None])[..., 0].double(), own)
        total = torch.logaddexp(total, _summed_exponentials(logits))
    return own - total


def _wide(logits: Float[Tensor, "... row"]) -> Float[Tensor, "... row"]:
    """The logits in a precision in which exponentials can be summed."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _summed_exponentials(logits: Float[Tensor, "... row"]) -> Float[Tensor, "..."]:
    """Log-sum-exp of a block (float64), its exponentials in the logits' own precision; the logits are overwritten."""
    top = logits.amax(-1, keepdim=True)
    top = top.clamp_(min=torch.finfo(logits.dtype).min)  # finite where nothing is left of a block
    return logits.sub_(top).exp_().sum(-1).double().log() + top[..., 0]


def blocks_of_rows(subject: Subject, n_reads: int) -> Iterator[slice]:
    """Cuts the unembedding's rows so that their logits at `n_reads` places fit together: into the cache of a processor."""
    n_rows = len(subject.unembedding[0])
    fitting = VOCABULARY_BLOCK if subject.device.type == "cpu" else n_rows
    step = max(1, min(fitting, BLOCK_LOGITS // max(n_reads, 1)))
    return (slice(start, min(n_rows, start + step)) for start in range(0, n_rows, step))


def rest_against(parts: Iterable[tuple[int, Tensor]], rows: Sequence[int]) -> Float[Tensor, "..."]:
    """Log-sum-exp of all logits but those of `rows`, minus that of `rows` (float64).

    `parts` are the vocabulary's logits (..., row), block by block, each with the id of its first row; they are overwritten.
    Exponentials are taken and summed in the logits' own precision, below the largest of a block, which adds less than the
    logits' own rounding; blocks are summed in float64.
    """
    others, mine = list[Tensor](), list[Tensor]()
    for start, part in parts:
        logits = _wide(part)
        here = [row - start for row in rows if 0 <= row - start < logits.shape[-1]]
        if here:
            mine.append(logits[..., here].double().logsumexp(-1))
            logits[..., here] = -torch.inf
        total = _summed_exponentials(logits)
        others = [torch.logaddexp(others[0], total) if others else total]
    return others[0] - torch.stack(mine).logsumexp(0)


@torch.no_grad()
def weighted_logits(
    subject: Subject, resid: Float[Tensor, "... d"], rows: Sequence[int], weights: Float[Tensor, "... row"],
    norm_like: Float[Tensor, "... d"] | None,
) -> Float[Tensor, "..."]:  # fmt: skip
    """Sum of some tokens' logits, each times its weight (float64): along one direction, unless a cap bends every logit."""
    normed, ids = _normed(subject, resid, norm_like), subject.tensor(rows)
    if subject.soft_cap is None:
        weight, bias = subject.unembedding
        parts = zip(ids.split(VOCABULARY_BLOCK), weights.split(VOCABULARY_BLOCK, -1), strict=True)
        direction = torch.stack([some @ weight[at].double() for at, some in parts]).sum(0).to(normed.dtype)
        shift = 0.0 if bias is None else weights @ bias[ids].double()
        return (normed * direction).sum(-1, dtype=torch.float64) + shift
    step = max(1, min(VOCABULARY_BLOCK, BLOCK_LOGITS // normed[..., 0].numel()))
    total = torch.zeros(normed.shape[:-1], dtype=torch.float64, device=normed.device)
    for at, some in zip(ids.split(step), weights.split(step, -1), strict=True):
        total += (_unembed(subject, normed, at).double() * some).sum(-1)
    return total


def _normed(subject: Subject, resid: Float[Tensor, "... d"], like: Float[Tensor, "... d"] | None) -> Tensor:
    return subject.final_norm(resid) if like is None else frozen_norm(subject.final_norm, resid, like)


def _unembed(
    subject: Subject, normed: Float[Tensor, "... d"], rows: slice | Int[Tensor, "row"]
) -> Float[Tensor, "... row"]:
    weight, bias = subject.unembedding
    result = nn.functional.linear(normed, weight[rows], None if bias is None else bias[rows])
    return result if subject.soft_cap is None else subject.soft_cap * torch.tanh(result / subject.soft_cap)


@torch.no_grad()
def norm_gain(norm: nn.Module) -> tuple[Float[Tensor, "..."], Float[Tensor, "d"] | None, float]:
    """Gain, bias and epsilon of a LayerNorm or RMSNorm; found by trying, since families store them in their own ways.

    Gemma stores the gain's distance from 1. A norm without weights (OLMo 1) has the gain 1, a single number, and one that does
    not say its epsilon is tried with the usual ones. Raises InputError for a module that computes something else.
    """
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    named = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    probe = _probe(norm)
    tolerance = max(1e-3, 4 * torch.finfo(probe.dtype).eps)
    gains = (torch.ones((), dtype=probe.dtype),) if weight is None else (weight, 1 + weight)
    near = partial(torch.allclose, rtol=tolerance, atol=tolerance)
    for gain, eps in itertools.product(gains, EPSILONS if named is None else (float(named),)):
        tried = (probe, SMALL * probe)  # at a small scale a wrong epsilon shows
        if all(near(_scaled(norm, x, x, gain, bias, eps), norm(x)) for x in tried):
            return gain, bias, eps
    raise InputError(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm that this module knows")


@torch.no_grad()
def is_centred(norm: nn.Module) -> bool:
    """True for a norm that subtracts the mean, as LayerNorm does: a shift of all entries does not change its output."""
    probe = _probe(norm)
    plain = norm(probe)
    return torch.allclose(norm(probe + 1), plain, rtol=0, atol=0.1 * float(plain.std()))


def _probe(norm: nn.Module) -> Float[Tensor, "d"]:
    """A vector of small whole numbers, of the norm's width, place and precision; without weights any width will do."""
    weight = getattr(norm, "weight", None)
    like = weight if isinstance(weight, Tensor) else torch.ones(*getattr(norm, "normalized_shape", (16,)))
    return torch.ones_like(like) * torch.arange(1, len(like) + 1, device=like.device) % 7 - 3.0


def frozen_norm(norm: nn.Module, resid: Float[Tensor, "... d"], like: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """The norm with the scale of another residual: an affine function of `resid`."""
    return _scaled(norm, resid, like, *norm_gain(norm))


def _scaled(norm: nn.Module, resid: Tensor, like: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if is_centred(norm):
        resid, like = (x - x.mean(-1, keepdim=True) for x in (resid, like))
    normed = gain * resid * torch.rsqrt(like.pow(2).mean(-1, keepdim=True) + eps)
    return normed if bias is None else normed + bias


def read_positions(base: CleanRun, read: Sequence[int]) -> Int[Tensor, "read"]:
    """Read positions counted from the front; negative ones count from the end."""
    n_pairs, n_pos = base.tokens.shape
    if not read or min(read) < -n_pos or max(read) >= n_pos:
        raise InputError(f"read positions {read} do not exist in {n_pairs} sequences of {n_pos} tokens")
    return torch.tensor([position % n_pos for position in read], device=base.tokens.device)
