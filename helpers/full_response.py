"""Y2: mediation of the whole answer, teacher-forced, instead of its first token.

Only prompt cells are patched; the answer's own tokens see the patch through attention, as they would when generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers import grid, outcomes, positions
from helpers.grid import CleanRun, Patch
from helpers.mediation import Mediator, batches, estimands, prompt_tokens, tidy
from helpers.progress import progress
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair


def effects(
    subject: Subject, pairs: Sequence[TokenPair], openers: Mapping[str, Openers], wanted: Sequence[Mediator]
) -> pd.DataFrame:
    """The tidy table of `mediation.effects` for Y2 = log p(answer) - log p(refusal), in nats.

    Answer and refusal are the model's own (`outcomes.continuations`), the same words for all four cells of a pair.
    Meant for pairs that share their request (T2, T2b): otherwise an answer to one prompt is off-topic for the other.
    """
    groups = progress(batches(pairs, subject), desc="full responses")
    return pd.concat([batch_effects(subject, group, openers, wanted) for group in groups], ignore_index=True)


def batch_effects(
    subject: Subject, group: Sequence[TokenPair], openers: Mapping[str, Openers], wanted: Sequence[Mediator]
) -> pd.DataFrame:
    """The rows of one batch: pairs of one treatment and one length."""
    header = positions.user_header(subject.tokenizer) if subject.tokenizer is not None else ""
    cells = _cells(subject, group, openers[group[0].pair.treatment], wanted, header)
    return estimands(tidy(group, wanted, "Y2", cells))


def _cells(
    subject: Subject, group: Sequence[TokenPair], openers: Openers, wanted: Sequence[Mediator], header: str
) -> dict[str, Float[np.ndarray, "pair mediator"]]:
    control, treated = prompt_tokens(subject, group)
    texts = outcomes.continuations(subject, control, treated, openers)
    answer = _log_probs(subject, group, (control, treated), (texts.answer, texts.answer_mask), wanted, header)
    refusal = _log_probs(subject, group, (control, treated), (texts.refusal, texts.refusal_mask), wanted, header)
    return {cell: answer[cell] - refusal[cell] for cell in answer}


def _log_probs(
    subject: Subject,
    group: Sequence[TokenPair],
    prompts: tuple[Int[Tensor, "pair pos"], Int[Tensor, "pair pos"]],
    text: tuple[Int[Tensor, "pair step"], Bool[Tensor, "pair step"]],
    wanted: Sequence[Mediator],
    header: str,
) -> dict[str, Float[np.ndarray, "pair mediator"]]:
    """log p of one continuation in all four cells."""
    tokens, mask = text
    n_prompt, n_steps = prompts[0].shape[1], tokens.shape[1]
    runs = [grid.clean_run(subject, torch.cat([prompt, tokens[:, :-1]], dim=1)) for prompt in prompts]
    read = range(n_prompt - 1, n_prompt - 1 + n_steps)
    clean = [outcomes.sequence_log_prob(subject, run.resid_post[-1][:, list(read)], tokens, mask) for run in runs]
    made = _patches(group, wanted, header, runs[0])
    patched = []
    for base, source in (runs, runs[::-1]):
        resid = grid.interchange(subject, base, source, made, read=tuple(read))
        # One mediator at a time: the full vocabulary at every step is the largest array of the whole companion.
        scores = [
            outcomes.sequence_log_prob(subject, resid[:, i], tokens, mask).cpu().numpy() for i in range(len(made))
        ]
        patched.append(np.stack(scores, axis=1))
    shape = patched[0].shape
    y00, y11 = (np.broadcast_to(score.cpu().numpy()[:, None], shape) for score in clean)
    return {"y00": y00, "y01": patched[0], "y10": patched[1], "y11": y11}


def _patches(group: Sequence[TokenPair], wanted: Sequence[Mediator], header: str, run: CleanRun) -> list[Patch]:
    """Interventions on the prompt's cells of a sequence that goes on behind it."""
    n_all = run.tokens.shape[1]
    made = []
    for mediator in wanted:
        mask = np.zeros((len(group), n_all), dtype=bool)
        stacked = positions.stack(group, header, mediator.position)
        mask[:, : stacked.shape[1]] = stacked
        head = None if mediator.head < 0 else mediator.head
        made.append(Patch(mediator.site, mediator.layer, torch.tensor(mask, device=run.tokens.device), head))
    return made
