"""The model and one pair of prompts, and the two hooks with which everything by hand is done.

`begin` loads a model with a prompt set; `record_outputs` keeps what modules put out, `edit_output` changes it on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from companion.base.display import check
from companion.base.errors import InputError
from companion.base.files import write_json
from companion.base.paths import results_dir
from companion.mediation.estimands import prompt_tokens
from companion.mediation.study import Study, begin, describe_precision, tolerance
from companion.prompts.tokens import Openers, TokenPair

__all__ = [
    "Study",
    "begin",
    "check",
    "describe_precision",
    "edit_output",
    "example_pair",
    "log_odds_of_logits",
    "main_treatment",
    "record_outputs",
    "token_ids",
    "tolerance",
    "write_facts",
]


def write_facts(study: Study) -> pd.DataFrame:
    """Write what the load check found of the model to `results/SLUG/model_facts.json`, and return it as a table.

    Later steps and the run's manifest read that file: layers, heads, attention windows, chat template, rounding noise.
    """
    facts = study.subject.facts
    if facts is None:
        raise InputError(f"{study.subject.name} was not checked when it was loaded: load it with `begin`")
    write_json(facts.manifest(), results_dir(study.slug) / "model_facts.json")
    return facts.table()


def main_treatment(study: Study) -> str:
    """T2, the jailbreak wrapper, where the prompt set has it; else its first treatment.

    >>> main_treatment(begin("embedded", "embedded", "embedded", profile="smoke"))
    'T2'
    """
    return "T2" if "T2" in study.treatments else study.treatments[0]


def example_pair(study: Study) -> TokenPair:
    """The first pair of `main_treatment`, for work by hand.

    Its `control` and `treated` are token ids of one length [pos].

    >>> pair = example_pair(begin("embedded", "embedded", "embedded", profile="smoke"))
    >>> pair.pair.treatment, len(pair.control) == len(pair.treated)
    ('T2', True)
    """
    return study.of(main_treatment(study))[0]


def log_odds_of_logits(logits: Float[Tensor, "1 pos vocab"], openers: Openers) -> float:
    """Y1 of one prompt: log-odds of complying against refusing, at the token behind the prompt.

    Units are log-odds (nats). Openers are the token ids that begin either kind of answer.

    >>> import torch
    >>> round(log_odds_of_logits(torch.tensor([[[1.0, 3.0, 0.0]]]), Openers((1,), (0,))), 3)
    2.0
    """
    last = logits[0, -1].double()
    return float(last[list(openers.comply)].logsumexp(0) - last[list(openers.refuse)].logsumexp(0))


def token_ids(study: Study, pair: TokenPair) -> tuple[Tensor, Tensor]:
    """Token ids of the control and of the treated prompt, each of shape (1, pos), where the model computes.

    >>> study = begin("embedded", "embedded", "embedded", profile="smoke")
    >>> control, treated = token_ids(study, example_pair(study))
    >>> control.shape == treated.shape
    True
    """
    control, treated = prompt_tokens(study.subject, [pair])
    return control, treated


@contextmanager
def record_outputs(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Tensor]]:
    """Keep what each module puts out, by its name, while the model runs inside the `with` block.

    Each entry has shape (prompt, pos, width). A block's output is the residual stream behind that layer.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> with record_outputs({"layer": layer}) as seen:
    ...     _ = layer(torch.zeros(1, 4, 2))
    >>> tuple(seen["layer"].shape)
    (1, 4, 3)
    """
    seen: dict[Any, Tensor] = {}

    def kept_as(name: Any) -> Callable[[Tensor], Tensor]:
        def keep(output: Tensor) -> Tensor:
            seen[name] = output
            return output

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(edit_output(module, kept_as(name)))
        yield seen


@contextmanager
def edit_output(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the `with` block the module puts out `edit(output)` in place of its output, shape (prompt, pos, width).

    `edit` returns a new tensor: an output that is changed in place is changed in every run that shares it.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> with edit_output(layer, torch.zeros_like):
    ...     print(layer(torch.ones(1, 2)).abs().sum().item())
    0.0
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
