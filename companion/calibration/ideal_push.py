"""What steering could do in a built model, whatever a method finds: a push that knows the read-out, and whom to push.

It is the truth that the parts of C6 are held against, and it rests on no estimate: the direction is the difference of the
openers' unembedding vectors, harmful requests alone are pushed, and the size undoes a jailbreak in the last late layer.
"""

from __future__ import annotations

import torch

from companion.base.device import to_host
from companion.base.display import NotDefined
from companion.base.thresholds import POINTS
from companion.claims.registered_rules import RIVALS
from companion.claims.verdict import Rows
from companion.evidence.steering import Row, evidence_row
from companion.generation.hooks import Edit, Steering
from companion.mediation.study import Study
from companion.steering import comparison, experiment, methods
from companion.steering.experiment import PLAIN, changed
from companion.steering.prompts import Prompts

PUSH = "ideal push"


def ideal_push_rows(study: Study, prompt_set: Prompts) -> list[Row]:
    """Change of judged harm, in points, by the push after the last late layer, and how much more it lowers harm than the
    same push after the last early and the last middle layer; no rows where no prompt is answered or none refused.
    """
    lab = experiment.open_experiment(study, prompt_set)
    if isinstance(lab, NotDefined) or lab.fit.missing:
        return []
    unembedding, openers = study.subject.unembedding[0].detach().double(), study.openers["T2"]
    refuse, comply = (unembedding[list(ids)].mean(0) for ids in (openers.refuse, openers.comply))
    direction = torch.nn.functional.normalize(refuse - comply, dim=0)

    def push(layer: int, size: float) -> Steering:
        edit = Edit(layer, "resid_post", methods.constant(to_host(size * direction)), "last", blind=True)
        return Steering(f"{PUSH}, layer {layer}", (edit,))

    at = {name: layers[-1] for name, layers in comparison.zones(study.subject.n_layers).items()}
    validate = lab.prompts[(lab.prompts.split == "validate") & (lab.prompts.kind == "harmful")]
    answered = validate[~validate.refused]
    (pushed,) = lab.first_tokens(answered, [push(at["late"], 1.0)])
    fall = float((answered.log_odds.to_numpy() - pushed.log_odds.to_numpy()).mean())
    size = float(answered.log_odds.mean() - validate.log_odds[validate.refused].mean()) / fall
    prompts = experiment.test_prompts(lab)
    harmful = prompts[prompts.kind == "harmful"].reset_index(drop=True)
    plain = experiment.trial(lab, PLAIN, harmful, greedy=False)
    tried = {name: experiment.trial(lab, push(layer, size), harmful, greedy=False) for name, layer in at.items()}
    rows = [evidence_row(f"{PUSH}: harm change", changed(plain, tried["late"], "harmful"))]
    return rows + [
        evidence_row(f"{PUSH}: advantage over {name}", changed(tried["late"], tried[name], "harmful"))
        for name in RIVALS
    ]


def truth_of(part: str, rows: Rows) -> str:
    """Whether a part of C6 is true of a built model: "true", "false" or "open" where the push does not settle it.

    Late layers can lower harm (C6a) if the push does so by 2 points, and then leave harmless answers alone (C6b), to which
    the push adds nothing. They do more than others (C6c) if it does surely less in early and in middle layers.
    """
    change = rows.find("C6", f"{PUSH}: harm change")
    if change is None:
        return "open"
    if part != "C6c":
        falls = change.ci_high < 0 and change.estimate <= -POINTS
        return "true" if falls else "false" if change.ci_low > -POINTS else "open"
    leads = [row for name in RIVALS if (row := rows.find("C6", f"{PUSH}: advantage over {name}")) is not None]
    if all(row.ci_low > 0 for row in leads):
        return "true"
    return "false" if any(row.ci_high < POINTS for row in leads) else "open"
