"""The model and one pair of prompts, the two hooks with which everything by hand is done, and the library's patches on a pair.

`begin` loads a model with a prompt set; `record_outputs` keeps what modules put out, `edit_output` changes it on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from companion.base.display import NotDefined, check
from companion.base.files import EFFECTS, read_table, write_json
from companion.base.paths import results_dir
from companion.base.thresholds import COMPONENTS
from companion.mediation.estimands import measure_effects, mediators, prompt_tokens, run_clean
from companion.mediation.outcomes import log_odds
from companion.mediation.study import Study, begin, describe_precision, tolerance
from companion.model.activations import on_output as edit_output
from companion.prompts.tokens import Openers, TokenPair

__all__ = ["Study", "begin", "check", "component_map", "describe_precision", "edit_output", "effects_of_pair", "example_pair",
           "kept", "log_odds", "log_odds_of_logits", "record_outputs", "run_clean", "token_ids", "tolerance",
           "write_facts"]  # fmt: skip

KEPT = {"02_layers": EFFECTS, "04_neurons": {"model": "str"}}


def write_facts(study: Study) -> None:
    """Write what the load check found of the model to `results/SLUG/model_facts.json`, which later steps read."""
    facts = study.subject.facts
    assert facts is not None  # `begin` checks a model
    write_json(facts.manifest(), results_dir(study.slug) / "model_facts.json")


def example_pair(study: Study) -> TokenPair:
    """The first pair of the main treatment, for work by hand; `control` and `treated` are token ids of one length [pos]."""
    return study.of(study.main_treatment)[0]


def log_odds_of_logits(logits: Float[Tensor, "1 pos vocab"], openers: Openers) -> float:
    """Y1 of one prompt: log-odds (nats) of complying against refusing, at the token behind the prompt.

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
    """Keep what each module puts out, [prompt, pos, width], by its name, while the model runs inside the `with` block.

    A block's output is the residual stream behind that layer.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> with record_outputs({"layer": layer}) as seen:
    ...     _ = layer(torch.zeros(1, 4, 2))
    >>> tuple(seen["layer"].shape)
    (1, 4, 3)
    """
    seen: dict[Any, Tensor] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(edit_output(module, partial(seen.__setitem__, name)))
        yield seen


def kept(study: Study, name: str) -> pd.DataFrame:
    """A table that an earlier notebook has written for the same run: "02_layers" (a row a pair, site, layer and outcome) or
    "04_neurons" (a row a model, treatment, split, layer and neuron), in log-odds.
    """
    return read_table(results_dir(study.slug) / f"{name}.parquet", KEPT[name])


# ---- patches on one pair ----


def effects_of_pair(
    study: Study, pair: TokenPair, sites: Sequence[str], outcomes: Sequence[str] = ("Y1",)
) -> pd.DataFrame:
    """All effects of one pair at the last token in log-odds: a row for each site and layer, with the four cells beside them.

    Sites are names such as "resid_post", "attn_out", "mlp_out", "mlp_out.direct".
    """
    return measure_effects(study.subject, [pair], study.openers, mediators(study.subject, sites), outcomes)


def component_map(study: Study, pair: TokenPair | NotDefined) -> pd.DataFrame | NotDefined:
    """Share of a pair's total effect in each layer's attention and MLP output at the last token, the mean of both directions.

    Columns layer, site, share. A pair of your own that is not defined gives its reason.
    """
    if isinstance(pair, NotDefined):
        return pair
    table = effects_of_pair(study, pair, COMPONENTS)
    return table.assign(share=(table.nie0 + table.nie1) / 2 / table.te)[["layer", "site", "share"]]
