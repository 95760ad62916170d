"""What is true of a compiled model, by its construction and by no estimator, and which estimator finds it.

The mechanism of T2 - T2b is everything on the last token's way from the wrapper to the outcome: heads that fetch the wrapper,
stages that compute from it, whatever writes the decision, and the side route. Components are attention or MLP outputs.

Knock-outs: a component gets its mean over all prompts, at every token that matters; all above it runs on, and what is lost of
T2 - T2b is read off the logits. No effect is signed or shared out, and the builder's labels do not enter. A knock-out cannot
tell computing from copying, so it is held against the labels where it can speak: the component that the builder says decides
must be needed (C1 says where that is), and the last that is needed is the one that writes (C2).

The parts of C6 are held against what steering could do: a push along the difference of the openers' unembedding vectors, of
harmful requests alone, whose size undoes a jailbreak in the last late layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from companion.base.device import to_host
from companion.base.display import NotDefined
from companion.base.thresholds import COMPONENTS, LATE, POINTS, depth
from companion.calibration.campaign import SCHEMAS, SCORES, read_shipped, run_campaign
from companion.calibration.rates import ranking_quality
from companion.claims.registered_rules import RIVALS
from companion.claims.verdict import Rows
from companion.evidence.layers import Layers
from companion.evidence.neurons import Neurons
from companion.evidence.steering import Row, evidence_row
from companion.generation.hooks import Edit, Steering
from companion.mediation import summaries
from companion.mediation.study import Study
from companion.mediation.summaries import Variant
from companion.neurons import screening
from companion.neurons.adjacency import HALF_WIDTH
from companion.neurons.single import in_split, sign_on_discover
from companion.steering import comparison, experiment, methods
from companion.steering.experiment import PLAIN, Prompts, changed
from organisms import compiled, compiled_language, compiled_truth
from organisms.compiled import Organism
from organisms.compiled_design import HELD_OUT, KINDS, SPLIT, Design, draw_design
from organisms.compiled_language import Planned, outcomes
from organisms.compiled_program import CHANNELS, Program, build_program
from organisms.compiled_truth import TRACED, readout, run_program

VARIANTS = {
    "total": Variant("main"), "full response": Variant("", outcome="Y2"), "direct": Variant("", outcome="contrast.frozen"),
}  # fmt: skip
NEEDED = 0.5  # a component is needed if more than this share of the behaviour goes with it
TOPICS, SEEDS = 60, range(700, 703)  # models of their own
BUILT = tuple(kind for kind in KINDS if kind not in (*SPLIT, *HELD_OUT))  # those whose labels are no matter of degree
SIGNS = {("T2", "treated"): 1, ("T2", "control"): -1, ("T2b", "treated"): -1, ("T2b", "control"): 1}
PUSH = "ideal push"


# ---- what was built where ----


@dataclass(frozen=True)
class Measured:
    """Evidence rows (`files.EVIDENCE`) with the tables behind them, for whoever compares estimators."""

    rows: pd.DataFrame
    layers: Layers | None
    neurons: Neurons | None
    computed: pd.DataFrame | None  # effects of what each component computes (`mechanisms`)


@dataclass(frozen=True)
class Built:
    """A built model as a study, with what is true of it: `parts` says what is where, `claims` which claims hold.

    `te` is the total effect of each T2 and T2b pair, in log-odds by pair id: it follows from the written numbers alone.
    """

    study: Study
    parts: pd.DataFrame
    te: pd.Series
    claims: Mapping[str, bool | None]

    def measured(self, title: str, shares: pd.Series) -> pd.DataFrame:
        """For the drawing: `parts` beside the measured shares of the total effect, in the same order."""
        return self.parts.assign(model=title, share=shares.to_numpy())[["model", "layer", "site", "role", "share"]]


def built(kind: str, seed: int) -> Built:
    """The model of a kind and seed with the pairs on which the draws of the calibration are measured."""
    organism = compiled.draw(kind, seed, topics=compiled.TOPICS, pairs_per_topic=1)
    pairs = [planned for planned in organism.pairs if planned.pair.treatment in ("T2", "T2b")]
    te = pd.Series(compiled_truth.total_effects(organism.program, pairs), [one.pair.id for one in pairs])
    return Built(compiled.study(organism), written_parts(organism.design), te, organism.claims)


def written_parts(design: Design) -> pd.DataFrame:
    """What the attention and the MLP of each layer were written to do with wrapper and harm: layer, site, role ("" for nothing).

    A decision that is copied was made at the token `<end>`, the last one of the request.

    >>> from organisms.compiled_design import draw_design
    >>> written_parts(draw_design("late", 11)).query("role != '' and layer > 2").role.tolist()
    ['reads the wrapper', 'decides', 'writes']
    """
    at, side = " (at <end>)" if design.writer == "copy" else "", design.side
    told = [("attn_out", design.recognise[0], "reads the request"), ("mlp_out", design.recognise[1], "sees harm")]
    told += [("attn_out", layer, f"reads the wrapper{at}") for layer in design.carry]
    for stage in design.stages:
        does = ["decides"] * (stage.op != "relay") + ["writes"] * (stage.target == "out")
        told.append(("mlp_out", stage.layer, (" and ".join(does) or "passes on") + at))
    if design.writer != "mlp":
        told.append(("attn_out", design.write_layer, "copies" if at else "decides and writes"))
    if side:
        sites = COMPONENTS if side.copy is None else ("attn_out",)
        told += [(site, side.layer if side.copy is None else side.copy, "side route") for site in sites]
    rows = [
        (layer, site, ", ".join(role for name, where, role in told if (name, where) == (site, layer)))
        for layer in range(design.n_layers)
        for site in COMPONENTS
    ]
    return pd.DataFrame(rows, columns=["layer", "site", "role"])


def writer(design: Design) -> tuple[str, int]:
    """The component (site, layer) that writes the decision."""
    return ("mlp_out" if design.writer == "mlp" else "attn_out"), design.write_layer


def decider(design: Design) -> tuple[str, int]:
    """The component (site, layer), at whatever token, in which wrapper and request become the decision."""
    computing = [stage.layer for stage in design.stages if stage.op != "relay"]
    return ("mlp_out", computing[0]) if computing else writer(design)


def mechanism_components(design: Design) -> set[tuple[str, int]]:
    """All components (site, layer) of the mechanism at the last token; what is copied from `<end>` enters by the copying."""
    side, found = design.side, {writer(design)}
    if design.writer != "copy":
        found |= {("attn_out", layer) for layer in design.carry} | {("mlp_out", stage.layer) for stage in design.stages}
    if side:
        own = {("attn_out", side.layer), ("mlp_out", side.layer)}
        found |= own if side.copy is None else {("attn_out", side.copy)}
    return found


def mechanism_neurons(organism: Organism) -> Bool[np.ndarray, "layer neuron"]:
    """Which neurons write a channel of the mechanism that counts at the last token."""
    names = ["out.side", *([] if organism.design.writer == "copy" else ["stage0", "stage1", "stage2", "out"])]
    columns = [CHANNELS[name] for name in names]
    return np.stack([(mlp.out[:, columns] != 0).any(axis=1) for mlp in organism.program.mlps])


def effects_of(table: pd.DataFrame, treatment: str, name: str) -> pd.DataFrame:
    """Effects of attention and MLP outputs on the last token, of one of the kinds in `VARIANTS`."""
    sites = [f"{site}.direct" if name == "direct" else site for site in COMPONENTS]
    return summaries.select(table, treatment, VARIANTS[name], sites)


def localise_draw(organism: Organism, this: Study, measured: Measured) -> pd.DataFrame:
    """One row an estimator and measure of how well it finds the mechanism (`SCORES`), from all pairs of T2 - T2b.

    Is the component of the largest mean signed effect the writer (by site and layer), and the decider? What is computed beyond
    the sum of the inputs shows the decider alone.
    """
    effects: dict[str, pd.DataFrame] = {}
    if measured.layers:
        effects = {name: effects_of(measured.layers.effects, "T2-T2b", name) for name in VARIANTS}
    if measured.computed is not None:
        effects["computed"] = measured.computed
    found: list[tuple[str, str, float]] = []
    known, true, decides = mechanism_components(organism.design), writer(organism.design), decider(organism.design)
    for name in (name for name, table in effects.items() if len(table)):
        table = summaries.signed(effects[name])
        mean = table.assign(site=table.site.str.removesuffix(".direct")).groupby(["site", "layer"])["nie"].mean()
        at = mean.idxmax()
        if name != "computed":
            quality = ranking_quality([key in known for key in mean.index], mean)
            found += [(name, f"components, {what}", value) for what, value in quality.items()]
            found += [(name, "layer error", abs(at[1] - true[1])), (name, "module accuracy", at[0] == true[0])]
        found += [(name, "decision found", at == decides), (name, "decision, layer error", abs(at[1] - decides[1]))]
    if measured.neurons:
        member = mechanism_neurons(organism).ravel()
        for name, score in neuron_scores(measured.neurons, this).items():
            quality = ranking_quality(member.tolist(), score.tolist())
            found += [(name, f"neurons, {what}", value) for what, value in quality.items()]
    table = pd.DataFrame(found, columns=["estimator", "what", "value"]).astype({"value": float})
    return table.assign(kind=organism.design.kind, seed=organism.design.seed)[list(SCORES)]


def neuron_scores(found: Neurons, this: Study) -> dict[str, Float[np.ndarray, "neuron"]]:
    """Scores of all neurons, layer by layer: exact total and direct effect, window mean, gradient screen.

    A window is the mean signed effect of a neuron and its 8 neighbours by index on either side, as far as there are any.
    """
    effects = found.measured.effects["T2-T2b"]
    sign, d_mlp = sign_on_discover(effects.pairs), found.measured.study.subject.d_mlp
    mean = {name: sign * values.mean(0) for name, values in in_split(effects, "all").values.items()}
    total, box = (mean["nie0"] + mean["nie1"]) / 2, np.ones(2 * HALF_WIDTH + 1)
    size = np.convolve(np.ones(d_mlp), box, "same")
    scores = {
        "total": total,
        "direct": mean["direct"],
        "window": np.concatenate([np.convolve(layer, box, "same") / size for layer in total.reshape(-1, d_mlp)]),
        "gradient screen": screening.estimates(this, "T2-T2b").estimate.to_numpy(),
    }
    return {name: abs(values) for name, values in scores.items()}


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
