"""The compiled model of `handmade` as a subject of steering: its prompts, a fit, and a lab, all known by hand.

Every answer opens with "yes" or "no", so that P(refusal) is the logistic function of minus the log-odds: 0 where the cue is
"off" or there is none, 1.5 where it is "on". What is written into channel `OUT` at the last token adds to them.
"""

import pandas as pd
import torch
from handmade import BIAS, OUT, SIZE, WORDS, Program, compiled

from helpers import defence_outcomes
from helpers import steering as st
from helpers import steering_fit as sf
from helpers.defence import Lab
from helpers.defence_prompts import UNKNOWN
from helpers.tokens import Openers

ON = 1.5  # log-odds of "yes" where the cue is "on"


def prompts() -> pd.DataFrame:
    """Requests that cue "off" (refused) or "on" (complied), and benign ones without the word; fillers vary."""
    rows = []
    cues = (("harmful", True, "off low"), ("harmful", False, "on low"), ("harmless", False, "well low"))
    for i in range(12):
        for kind, refused, cue in cues:
            text = " ".join(["please", cue, WORDS[4 + i % 5], *(["kind"] if i % 2 else []), "do it"])
            rows.append((f"{kind}{i}{refused}", text, kind, "discover" if i < 6 else "validate", refused))
    return pd.DataFrame(rows, columns=list(sf.COLUMNS))


def fitted() -> sf.Fit:
    """The fit on these prompts."""
    subject = compiled(Program(skip=0.0))
    assert subject.tokenizer is not None
    yes, no = (subject.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    with torch.no_grad():  # all answers open with one of the two, so that a refusal is one by its probability
        subject.model.get_output_embeddings().weight[[yes, no], BIAS] = 30 / SIZE
    return sf.fit(subject, Openers((yes,), (no,)), prompts(), neuron_layers=range(4))


def lab(fit: sf.Fit) -> Lab:
    """A lab of the same prompts, each a topic of its own, its judge never satisfied."""
    table = prompts().assign(wrapped=False, family="", tier=UNKNOWN, severity=0.0, suite="")
    found = defence_outcomes.log_odds(fit.subject, table.text, fit.openers)
    table = pd.concat([table.assign(topic=table.id), found], axis=1)
    return Lab(fit.subject, fit.openers, table, lambda request, answer: "off_topic")


def towards_no(name: str, size: float, gate: st.Opening | None = None) -> st.Steering:
    """Takes `size` off the log-odds of every prompt (for which the gate opens), at the last token."""
    down = torch.zeros(16)
    down[OUT] = -size
    edit = st.Edit(2, "mlp_out", lambda x, prompt: down.expand(len(x), 1, -1), "last")
    return st.Steering(name, (edit,), gate=gate)


def opens_for(fit: sf.Fit, word: str) -> st.Opening:
    """A gate that opens for prompts with this word."""
    assert fit.subject.tokenizer is not None
    token = fit.subject.tokenizer.convert_tokens_to_ids(word)
    return lambda prompt: (prompt.ids == token).any(-1).float()
