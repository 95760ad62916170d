"""Outcomes: what a run of the model is scored by, each a function of the final residual stream.

Y1 is the log-odds of complying against refusing at the first answer token. `contrast` is its linear stand-in: with the final
norm's scale frozen it is additive over everything written into the residual stream. Y2 compares a whole answer with a whole
refusal, teacher-forced. Y3, judged generation, is in `companion.generation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from companion.model import activations, memory, readout, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject, end_tokens
from companion.model.interventions import Patch
from companion.prompts.tokens import Openers

STEPS = memory.ANSWER  # tokens of an answer
# One text a pair, as tokens padded on the right, and a mask that is False on padding.
Text = tuple[Int[Tensor, "pair step"], Bool[Tensor, "pair step"]]


def _opener_logits(
    subject: Subject, resid: Float[Tensor, "... d"], openers: Openers, norm_like: Tensor | None
) -> tuple[Float[Tensor, "... comply"], Float[Tensor, "... refuse"]]:
    if openers.rest:  # most of the unembedding: its rows are not copied out of it
        logits = readout.logits(subject, resid, None, norm_like).double()
        return logits[..., subject.tensor(openers.comply)], logits[..., subject.tensor(openers.refuse)]
    rows = torch.tensor(openers.comply + openers.refuse, device=resid.device)
    logits = readout.logits(subject, resid, rows, norm_like).double()
    return logits[..., : len(openers.comply)], logits[..., len(openers.comply) :]


def log_odds(
    subject: Subject, resid: Float[Tensor, "... d"], openers: Openers, norm_like: Tensor | None = None
) -> Float[Tensor, ...]:
    """Y1: log p(any comply opener) - log p(any refuse opener) at the first answer token, in log-odds (float64).

    `resid` is the final residual stream there; `norm_like` freezes the final norm's scale at that of another one.
    """
    if openers.rest:
        return readout.log_odds_against_rest(subject, resid, openers.refuse, norm_like)
    comply, refuse = _opener_logits(subject, resid, openers, norm_like)
    return comply.logsumexp(-1) - refuse.logsumexp(-1)


def contrast(
    subject: Subject, resid: Float[Tensor, "... d"], openers: Openers, norm_like: Tensor | None,
    weights: tuple[Tensor, Tensor],
) -> Float[Tensor, ...]:  # fmt: skip
    """Mean comply logit - mean refuse logit, weighted (`opener_weights`): linear in `resid` if `norm_like` is given."""
    if openers.rest:
        signed = torch.cat([weights[0], -weights[1]], -1)
        return readout.weighted_logits(subject, resid, openers.comply + openers.refuse, signed, norm_like)
    camps = _opener_logits(subject, resid, openers, norm_like)
    comply, refuse = ((camp * weight).sum(-1) for camp, weight in zip(camps, weights, strict=True))
    return comply - refuse


def opener_weights(
    subject: Subject, control: Float[Tensor, "... d"], treated: Float[Tensor, "... d"], openers: Openers
) -> tuple[Float[Tensor, "... comply"], Float[Tensor, "... refuse"]]:
    """Weights that make `contrast` follow Y1: each opener's share of its kind (Y1's gradient), the mean of both clean runs."""
    is_large, camps = openers.rest and control.ndim > 1, []  # a weight a pair for nearly every token
    for some in memory.vocabulary_blocks(subject, len(control), 2) if is_large else [slice(None)]:
        runs = [_opener_logits(subject, resid[some], openers, None) for resid in (control, treated)]
        camps.append([(at.softmax(-1) + at1.softmax(-1)) / 2 for at, at1 in zip(*runs, strict=True)])
    comply, refuse = map(torch.cat, zip(*camps, strict=True))
    return comply, refuse


def named_outcome(
    subject: Subject, resid: Float[Tensor, "... d"], control: Float[Tensor, "... d"], treated: Float[Tensor, "... d"],
    openers: Openers, name: str,
) -> Float[Tensor, ...]:  # fmt: skip
    """One of "Y1" (log-odds), "Y1.frozen" and "contrast.frozen" (the final norm's scale held at the control run's).

    `control` and `treated` are the final residual streams of the two clean runs; the contrast has the weights of both.
    """
    norm_like = control if name.endswith(".frozen") else None
    if name.startswith("contrast"):
        return contrast(subject, resid, openers, norm_like, opener_weights(subject, control, treated, openers))
    return log_odds(subject, resid, openers, norm_like)


def opener_probabilities(
    subject: Subject, resid: Float[Tensor, "pair d"], openers: Openers
) -> tuple[Float[Tensor, "pair"], Float[Tensor, "pair"]]:
    """Probabilities of any comply and of any refuse opener among all tokens; with a sum below 0.8 Y1 sees too little."""
    camps = []
    for some in memory.vocabulary_blocks(subject, len(resid), 1):
        probabilities = readout.logits(subject, resid[some]).double().softmax(-1)
        refuse = probabilities[..., list(openers.refuse)].sum(-1)
        camps.append([1 - refuse if openers.rest else probabilities[..., list(openers.comply)].sum(-1), refuse])
    comply, refuse = map(torch.cat, zip(*camps, strict=True))
    return comply, refuse


def continuations(
    subject: Subject, control: Int[Tensor, "pair pos"], treated: Int[Tensor, "pair pos"], openers: Sequence[Openers],
    steps: int = STEPS,
) -> tuple[Text, Text]:  # fmt: skip
    """The model's own answer and refusal to each pair, for Y2, without steps that are padding everywhere; `openers` a pair.

    The answer opens with the likeliest comply token after the treated prompt, the refusal with the likeliest refuse
    token after the control prompt; both go on greedily, and serve both prompts of a pair.
    """
    camps = [*(one.comply for one in openers), *(one.refuse for one in openers)]
    both = opened_with(subject, torch.cat([treated, control]), camps, steps)
    halves = zip(*(part.split(len(openers)) for part in both), strict=True)
    answer, refusal = ((text[:, mask.any(0)], mask[:, mask.any(0)]) for text, mask in halves)
    return answer, refusal


@torch.no_grad()
def opened_with(subject: Subject, prompt: Int[Tensor, "pair pos"], camps: Sequence[Sequence[int]], steps: int) -> Text:
    """The likeliest token of its camp behind each prompt and its greedy continuation."""
    # Not the library's generate: it would apply the model's own repetition penalty and the like.
    with activations.prefix_once(subject, activations.shared_prefix(subject, prompt)):
        out = subject.model(prompt, use_cache=True, logits_to_keep=1)
    distinct = {id(camp): camp for camp in camps}  # pairs share theirs, which may be nearly the whole vocabulary
    ids = {key: subject.tensor(camp) for key, camp in distinct.items()}
    likeliest = [logits[ids[id(camp)]].argmax() for logits, camp in zip(out.logits[:, -1], camps, strict=True)]
    openers = [camp[int(at)] for camp, at in zip(camps, torch.stack(likeliest).tolist(), strict=True)]
    text = torch.tensor(openers, device=prompt.device)[:, None]
    ends = torch.tensor([*end_tokens(subject)], device=prompt.device, dtype=prompt.dtype)
    while text.shape[1] < steps and not torch.isin(text, ends).any(-1).all():
        out = subject.model(text[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        text = torch.cat([text, out.logits[:, -1:].argmax(-1)], dim=1)
    is_end = torch.isin(text, ends)
    # The first end token belongs to the text (stopping is part of it), what follows is padding.
    return text, is_end.cumsum(-1) - is_end.long() == 0


def sequence_log_prob(
    subject: Subject, resid: Float[Tensor, "pair ... step d"], text: Text
) -> Float[Tensor, "pair ..."]:
    """Sum over steps of log p(token | everything before), in nats (float64); `resid` is at the positions before each."""
    extra = (1,) * (resid.ndim - 3)
    tokens, mask = (part.reshape(len(part), *extra, part.shape[1]).expand(resid.shape[:-1]) for part in text)
    return (readout.token_log_probs(subject, resid, tokens) * mask).sum(-1)


def forced_run(
    subject: Subject, prompt: Int[Tensor, "pair pos"], text: Text, beside: Sequence[Int[Tensor, "pair pos"]] = ()
) -> CleanRun:
    """The clean run of a prompt and a text, without its last token; what prompts `beside` it share with it is computed once."""
    shared = activations.shared_prefix(subject, prompt, *beside)
    return activations.clean_run(subject, torch.cat([prompt, text[0][:, :-1]], dim=1), shared=shared)


def decided_at(run: CleanRun, text: Text) -> list[int]:
    """The positions of a `forced_run` at which the text's tokens are decided."""
    return list(range(run.tokens.shape[1] - text[0].shape[1], run.tokens.shape[1]))


def patched_text_log_probs(
    subject: Subject, base: CleanRun, source: CleanRun, patches: Sequence[Patch | Sequence[Patch]], text: Text
) -> Float[Tensor, "pair patch"]:
    """log p of a text, teacher-forced, in nats, under each intervention; `base` and `source` are `forced_run`s of it."""
    resid = replay.interchange(subject, base, source, patches, read=decided_at(base, text))
    return torch.stack([sequence_log_prob(subject, resid[:, i], text) for i in range(len(patches))], dim=1)
