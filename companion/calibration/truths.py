"""Truths of built models that rest on no estimate: what goes when a component is knocked out, and what a push could do.

A component (attention or MLP output of a layer) gets its mean over all prompts, at every token that matters; all above it runs
on, and what is lost of T2 - T2b is read off the logits. No effect is signed or shared out, and the builder's labels do not enter.
A knock-out cannot tell computing from copying, so it is held against the labels where it can speak: the component that the
builder says decides must be needed (C1 says where that is), and the last that is needed is the one that writes (C2).

The parts of C6 are held against what steering could do: a push along the difference of the openers' unembedding vectors, of
harmful requests alone, whose size undoes a jailbreak in the last late layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch

from companion.base.device import to_host
from companion.base.display import NotDefined
from companion.base.thresholds import COMPONENTS, LATE, POINTS, depth
from companion.calibration.campaign import SCHEMAS, read_shipped, run_campaign
from companion.calibration.localise import decider, mechanism_components
from companion.claims.registered_rules import RIVALS
from companion.claims.verdict import Rows
from companion.evidence.steering import Row, evidence_row
from companion.generation.hooks import Edit, Steering
from companion.mediation.study import Study
from companion.steering import comparison, experiment, methods
from companion.steering.experiment import PLAIN, changed
from companion.steering.prompts import Prompts
from organisms import compiled_language, compiled_truth
from organisms.compiled_design import HELD_OUT, KINDS, SPLIT, Design, draw_design
from organisms.compiled_language import Planned, outcomes
from organisms.compiled_program import Program, build_program
from organisms.compiled_truth import TRACED, readout, run_program

NEEDED = 0.5  # a component is needed if more than this share of the behaviour goes with it
TOPICS, SEEDS = 60, range(700, 703)  # models of their own
BUILT = tuple(kind for kind in KINDS if kind not in (*SPLIT, *HELD_OUT))  # those whose labels are no matter of degree
SIGNS = {("T2", "treated"): 1, ("T2", "control"): -1, ("T2b", "treated"): -1, ("T2b", "control"): 1}
PUSH = "ideal push"


# ---- knock-outs ----


def knock_out_losses(program: Program, pairs: Sequence[Planned]) -> pd.Series:
    """Share of T2 - T2b that is lost with each component, by (site, layer)."""
    requests, signs = [], []
    for (treatment, side), sign in SIGNS.items():
        chosen = [one for one in pairs if one.pair.treatment == treatment]
        requests += [getattr(one, side) for one in chosen]
        signs += [sign / len(chosen)] * len(chosen)
    found = compiled_truth.roles(program, requests)
    end = run_program(program, found, "end")
    last = run_program(program, found, "last", end.pre)

    def behaviour(state: np.ndarray) -> float:
        return float(readout(program, *outcomes()["T2"], state) @ np.array(signs))

    def without(site: str, layer: int) -> np.ndarray:
        writes = [getattr(run, TRACED[site])[layer] for run in (end, last)]
        means = [np.broadcast_to(write.mean(0), write.shape) for write in writes]
        known = run_program(program, found, "end", do={(site, layer): means[0]}, start=end).pre
        return run_program(program, found, "last", known, {(site, layer): means[1]}, start=last).post[-1]

    whole = behaviour(last.post[-1])
    at = pd.MultiIndex.from_product([COMPONENTS, range(program.n_layers)])
    return pd.Series([1 - behaviour(without(*place)) / whole for place in at], at)


def knock_outs(kinds: Iterable[str] = BUILT, seeds: Iterable[int] = SEEDS) -> pd.DataFrame:
    """A row a model: kind, seed; what is lost with the component that the builder says decides (`decider`), and most with one
    that has no part in it (`bystander`); the last needed component's `site` and whether it is `late`; and the builder's labels
    `is_mlp` (C2) and `is_late` (C1).
    """
    rows = []
    for kind, seed in itertools.product(kinds, seeds):
        design = draw_design(kind, seed)
        program, pairs = build_program(design, TOPICS), compiled_language.draw_pairs([seed, 0], TOPICS, 1)
        pairs = [one for one in pairs if one.pair.treatment in ("T2", "T2b")]
        losses = knock_out_losses(program, pairs)
        needed = losses[losses > NEEDED].index
        # Attention acts before the MLP of its layer.
        site, layer = max(needed, key=lambda at: (at[1], at[0] == "mlp_out"), default=("none", -1))
        truth = compiled_truth.true_claims(design, program, pairs)
        rows.append({
            "kind": kind, "seed": seed, "decider": float(losses[decider(design)]),
            "bystander": float(losses.drop(list(with_a_part(design)), errors="ignore").abs().max()),
            "site": site, "late": bool(depth(layer, design.n_layers) > LATE), "is_mlp": truth["C2"], "is_late": truth["C1"],
        })  # fmt: skip
    return pd.DataFrame(rows)[list(SCHEMAS["knock_outs"])]


def run_knock_outs(share: str = "1/1") -> None:
    """Knock out the components of every model of this share that is not shipped yet, and join what there is."""
    known = set(read_shipped("knock_outs", or_empty=True).kind)
    plan = {f"knock-out-{kind}": kind for kind in BUILT}
    run_campaign(plan, lambda kind: {"knock_outs": knock_outs([kind])}, ("knock_outs",), known.__contains__, share)


def with_a_part(design: Design) -> set[tuple[str, int]]:
    """All components that take part in the decision, at whatever token: mechanism, side route, and what recognises harm."""
    found = mechanism_components(design) | {("attn_out", design.recognise[0]), ("mlp_out", design.recognise[1])}
    found |= {("attn_out", layer) for layer in design.carry} | {("mlp_out", stage.layer) for stage in design.stages}
    side = design.side
    return found | ({("attn_out", side.layer), ("mlp_out", side.layer)} if side else set())


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """By kind, of so many `models`: in how many the knock-out agrees with the builder's labels, and what is lost on average.

    `decides`: the `decider` is needed, and no `bystander` is (see `knock_outs`). `C2`: the last needed component is an MLP just
    where the builder says that MLPs write. `C1`: it is late just where the builder says that the decision is.
    """
    by_kind = table.assign(
        decides=(table.decider > NEEDED) & (table.bystander < NEEDED),
        C2=(table.site == "mlp_out") == table.is_mlp.astype(bool),
        C1=table.late == table.is_late.astype(bool),
    ).groupby("kind", sort=False)
    counts = by_kind[["decides", "C2", "C1"]].sum().assign(models=by_kind.size())
    return counts.join(by_kind[["decider", "bystander"]].mean())


# ---- an ideal push ----


def ideal_push_rows(study: Study, prompt_set: Prompts) -> list[Row]:
    """Change of judged harm, in points, by the push after the last late layer, and its lead over the same push after the last
    early and the last middle layer; no rows where no prompt is answered or none refused.
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

    Late layers can lower harm (C6a) if the push does so by 2 points, and then leave harmless answers alone (C6b), to which the
    push adds nothing. They do more than others (C6c) if it does surely less in early and in middle layers.
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
