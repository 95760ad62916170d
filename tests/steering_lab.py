"""The compiled model of `models` as a subject of steering: its prompts, a fit, and an experiment, all known by hand.

Every answer opens with "yes" or "no", so that P(refusal) is the logistic function of minus the log-odds: 0 where the cue is
"off" or there is none, 1.5 where it is "on". What is written into channel `OUT` at the last token adds to them.
"""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from models import BIAS, OUT, SIZE, WORDS, Program, compiled

from companion.generation import forward, hooks, outcomes
from companion.prompts.tokens import Openers
from companion.steering import budget, extraction
from companion.steering.budget import EvaluationPrompts
from companion.steering.experiment import PLAIN, UNKNOWN, SteeringExperiment, answer

ON = 1.5  # log-odds of "yes" where the cue is "on"


def prompts() -> pd.DataFrame:
    """Requests that cue "off" (refused) or "on" (complied), and benign ones without the word; fillers vary."""
    rows = []
    for i in range(12):
        for kind, refused, cue in (("harmful", True, "off"), ("harmful", False, "on"), ("harmless", False, "well")):
            text = " ".join(["please", cue, "low", WORDS[4 + i % 5], *(["kind"] if i % 2 else []), "do it"])
            rows.append((f"{kind}{i}{refused}", text, kind, "discover" if i < 6 else "validate", refused))
    return pd.DataFrame(rows, columns=["id", "text", "kind", "split", "refused"])


def fitted() -> extraction.Fit:
    """The fit on these prompts."""
    subject = compiled(Program(skip=0.0))
    yes, no = (subject.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    with torch.no_grad():  # all answers open with one of the two, so that a refusal is one by its probability
        subject.model.get_output_embeddings().weight[[yes, no], BIAS] = 30 / SIZE
    return extraction.fit_classes(subject, Openers((yes,), (no,)), prompts())


def experiment_of(fit: extraction.Fit) -> SteeringExperiment:
    """An experiment on the same prompts, each a topic of its own, its judge never satisfied."""
    table = prompts().assign(wrapped=False, family="", tier=UNKNOWN, severity=0.0, suite="", topic=lambda own: own.id)
    table = pd.concat([table, outcomes.log_odds(fit.subject, table.text, fit.openers)], axis=1)
    study = SimpleNamespace(subject=fit.subject, is_costly=True)
    return SteeringExperiment(study, fit, table, lambda request, answer: "off_topic")


def evaluated(experiment: SteeringExperiment, split: str, *cues: str) -> EvaluationPrompts:
    """Harmful prompts with one of the cues, as many harmless ones, and two of those for the divergence."""
    table = experiment.prompts[experiment.prompts.split == split]
    harmful = table[table.text.map(lambda text: text.split()[1] in cues)]
    others = table[table.kind == "harmless"]
    own = answer(experiment, PLAIN, others[:2], greedy=True)
    return EvaluationPrompts(experiment, harmful, others, others[:2], own)


def towards_no(name: str, size: float, gate: hooks.Opening | None = None) -> hooks.Steering:
    """Takes `size` off the log-odds of every prompt (for which the gate opens), at the last token."""
    down = torch.zeros(16)
    down[OUT] = -size
    edit = hooks.Edit(2, "mlp_out", lambda x, prompt: down.expand(len(x), 1, -1), "last")
    return hooks.Steering(name, (edit,), gate=gate)


def opens_for(fit: extraction.Fit, word: str) -> hooks.Opening:
    """A gate that opens for prompts with this word."""
    token = fit.subject.tokenizer.convert_tokens_to_ids(word)
    return lambda prompt: (prompt.ids == token).any(-1).float()


def shut(prompt: hooks.Prompt) -> torch.Tensor:
    """A gate that opens for nothing."""
    return torch.zeros(len(prompt.ids))


def spent_on(fit: extraction.Fit, made: hooks.Steering, wanted: str) -> float:
    """The mean added norm on the prompts of one class."""
    return budget.added_norms(fit.subject, [made], texts_of(fit, wanted)).mean()


def texts_of(fit: extraction.Fit, wanted: str) -> list[str]:
    """The prompts of one class."""
    return fit.prompts.text[fit.prompts["class"] == wanted].tolist()


def log_odds_of(fit: extraction.Fit, made: hooks.Steering, wanted: str) -> np.ndarray:
    """Log-odds of complying with the prompts of one class, in full passes under the steering's hooks."""
    (yes,), (no,), found = fit.openers.comply, fit.openers.refuse, []
    for text in texts_of(fit, wanted):
        with hooks.applied(fit.subject, made), torch.no_grad():
            last = fit.subject.model(torch.tensor(forward.encode(fit.subject, text))[None]).logits[0, -1].double()
        found.append(float(last[yes] - last[no]))
    return np.array(found)


def following_last(x: torch.Tensor, prompt: hooks.Prompt) -> torch.Tensor:
    """What is added everywhere hangs on the last token."""
    return 0.5 * x[:, -1:].tanh()


def following_what_was_read(size: float, x: torch.Tensor, prompt: hooks.Prompt) -> torch.Tensor:
    """What is added everywhere hangs on the last token and on what was read."""
    return size * x[:, -1:].tanh() * prompt.read["g"].mean(-1)[:, None, None].exp()


def half_open(shut: int, prompt: hooks.Prompt) -> torch.Tensor:
    """Shut for one prompt (or none), open for the others as far as what was read says."""
    return torch.sigmoid(prompt.read["g"].sum(-1)) * (torch.arange(len(prompt.ids)) != shut)


def varied_steerings(part: hooks.Part, where: hooks.Where) -> list[hooks.Steering]:
    """Four that differ in what they add, in strength, in what their gates read, and in whom they open for."""

    def one(size: float, strength: float, layer: int, opening: hooks.Opening | None) -> hooks.Steering:
        delta = partial(following_what_was_read, size)
        edits = (hooks.Edit(2, part, delta, where), hooks.Edit(3, "mlp_out", delta, where))
        return hooks.Steering(f"{size}", edits, strength, opening, (hooks.Read("g", layer),))

    return [one(0.5, 1.0, 1, None), one(-0.7, 2.0, 0, partial(half_open, 0)), one(1.0, 0.5, 1, partial(half_open, 2)),
            one(1.0, 1.0, 0, shut), one(1.0, 0.0, 0, None)]  # fmt: skip
