"""The truth of a compiled model: every effect from its program's arithmetic, without tokens, attention or norms.

Which token a head looks at follows from the request: its wrapper, the verb and object of its main clause, its cue. So the
state of the last token (and of `<end>`, from which some models read a decision) is a recursion over layers in a few dozen
channels, and an intervention replaces one term of it. `true_claims` is about what was built, not what an estimator would say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Final

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import expit, logsumexp

from companion.base.thresholds import EARLY, LATE, depth
from companion.mediation import mechanisms
from companion.mediation.estimands import with_difference, with_estimands
from companion.neurons.sets import settles
from organisms.compiled_design import Design
from organisms.compiled_language import HARMFUL, HARMLESS, Planned, Request, outcomes
from organisms.compiled_program import CHANNELS, Head, Program

State = Float[np.ndarray, "prompt channel"]
TRACED = {"resid_post": "post", "attn_out": "attn", "mlp_out": "mlp"}  # site -> what a run's trace calls it
SITES = (*TRACED, "attn_out.direct", "mlp_out.direct")


@dataclass(frozen=True)
class Roles:
    """What heads find in each prompt: features of the tokens they look for, and means over all tokens seen."""

    looked: Mapping[str, State]
    mean: Mapping[str, State]
    size: Mapping[str, Float[np.ndarray, "prompt"]]


@dataclass(frozen=True)
class Trace:
    """A run of one token (last or `<end>`): what each layer wrote, and the state before and after it."""

    pre: Sequence[State]
    attn: Sequence[State]
    acts: Sequence[Float[np.ndarray, "prompt neuron"]]
    mlp: Sequence[State]
    post: Sequence[State]


def roles(program: Program, requests: Sequence[Request]) -> Roles:
    """Look the requests' words up."""

    def rows(words: Sequence[str]) -> State:
        return program.embed[[program.index[word] for word in words]]

    slot, verb, thing = (rows([getattr(one, word) for one in requests]) for word in ("slot", "verb", "object"))
    looked = {name: slot * slot[:, [CHANNELS[f"is_{name}"]]] for name in ("wrapper", "cue")}
    looked |= {"verb": verb, "object": thing}
    seen = {"end": [["<bos>", "<user>", *request.words(), "<end>"] for request in requests]}
    seen["last"] = [[*words, "<assistant>"] for words in seen["end"]]
    mean = {at: np.stack([rows(words).mean(axis=0) for words in texts]) for at, texts in seen.items()}
    size = {at: np.array([len(words) for words in texts], dtype=float) for at, texts in seen.items()}
    return Roles(looked, mean, size)


def attend(head: Head, found: Roles, at: str, x: State, end: Sequence[State] | None) -> State:
    """What a head writes at a token whose state is x; `end` holds the `<end>` token's states, if it lies before."""
    if head.look == "mean":
        source = found.mean[at]
    elif head.look == "self":
        source = x
    elif head.look == "end":
        source = x if end is None else end[head.layer]
    elif head.look == "conjunction":
        harm = x[:, CHANNELS["harm"]] + x[:, CHANNELS["harm.side"]]
        score = head.steep * harm * found.looked["wrapper"][:, CHANNELS["wrapper"]]
        others = np.log(np.exp(head.steep * head.threshold) + found.size[at] - 2)
        source = expit(score - others)[:, None] * found.looked["wrapper"]
    else:
        source = found.looked[head.look]
    return source @ head.value.T @ head.out.T


def run_program(
    program: Program, found: Roles, at: str = "last", end: Sequence[State] | None = None,
    do: Mapping[tuple[str, int], np.ndarray] | None = None, start: Trace | None = None,
) -> Trace:  # fmt: skip
    """One token through all layers. `do` replaces a site's value, keyed by (site, layer); sites as in `companion.model.replay`.

    `start` is the clean run: layers below the first intervention are taken from it.
    """
    do = do or {}
    first = min((layer for _, layer in do), default=0) if start else 0
    trace: dict[str, list[np.ndarray]] = {
        name: list(getattr(start, name)[:first]) if start else [] for name in ("pre", "attn", "acts", "mlp", "post")
    }
    token = program.index["<end>" if at == "end" else "<assistant>"]
    x = trace["post"][-1] if trace["post"] else np.tile(program.embed[token], (len(found.size[at]), 1))
    for layer in range(first, program.n_layers):
        own = end if at == "last" else None
        attn = np.sum([attend(head, found, at, x, own) for head in program.at(layer)], axis=0)
        attn = do.get(("attn_out", layer), attn)
        gate = (x + attn) @ program.mlps[layer].gate.T
        acts = gate * expit(gate) * ((x + attn) @ program.mlps[layer].up.T)  # silu(gate) up
        mlp = do.get(("mlp_out", layer), acts @ program.mlps[layer].out)
        post = do.get(("resid_post", layer), x + attn + mlp)
        for name, value in zip(trace, (x, attn, acts, mlp, post), strict=True):
            trace[name].append(value)
        x = post
    return Trace(**trace)


@dataclass(frozen=True)
class Side:
    """Both tokens' clean runs of one side of some pairs."""

    program: Program
    found: Roles

    @cached_property
    def end(self) -> Trace:
        return run_program(self.program, self.found, "end")

    @cached_property
    def last(self) -> Trace:
        return run_program(self.program, self.found, "last", self.end.pre)


def sides(program: Program, pairs: Sequence[Planned]) -> tuple[Side, Side]:
    """Control and treated runs."""
    control, treated = (roles(program, [getattr(pair, side) for pair in pairs]) for side in ("control", "treated"))
    return Side(program, control), Side(program, treated)


def readout(program: Program, comply: Sequence[str], refuse: Sequence[str], x: State) -> Float[np.ndarray, "prompt"]:
    """Y1 from a final state, in log-odds."""
    rows = [[program.index[word] for word in side] for side in (comply, refuse)]
    sides = [logsumexp(x @ program.unembed[row].T, axis=1) for row in rows]
    return sides[0] - sides[1]


def total_effects(program: Program, pairs: Sequence[Planned]) -> Float[np.ndarray, "pair"]:
    """TE of pairs of one treatment, in log-odds."""
    camps = outcomes()[pairs[0].pair.treatment]
    y00, y11 = (readout(program, *camps, side.last.post[-1]) for side in sides(program, pairs))
    return y11 - y00


def patched(base: Side, source: Side, site: str, layer: int) -> State:
    """Final state of the last token if the base's site takes the source's value there ("shared": at all later tokens)."""
    program, clean = base.program, base.last
    name = TRACED["resid_post" if site == "shared" else site.removesuffix(".direct")]
    value = getattr(source.last, name)[layer]
    if site.endswith(".direct"):
        return clean.post[-1] - getattr(clean, name)[layer] + value
    end, key = base.end.pre, ("resid_post" if site == "shared" else site, layer)
    if site == "shared":
        end = run_program(program, base.found, "end", do={key: source.end.post[layer]}, start=base.end).pre
    return run_program(program, base.found, "last", end, {key: value}, clean).post[-1]


def held(base: Side, source: Side, name: str, layer: int) -> State:
    """The last token's final state with the source's state after a layer and, above it, outputs held (see `mechanisms.HELD`)."""
    clean, above = base.last, range(layer + 1, base.program.n_layers)
    do = {(site, at): getattr(clean, TRACED[site])[at] for site in mechanisms.HELD[name] for at in above}
    own = clean.mlp[layer] - source.last.mlp[layer] if name == "all held" else 0.0
    do[("resid_post", layer)] = source.last.post[layer] + own
    return run_program(base.program, base.found, "last", base.end.pre, do, clean).post[-1]


def effect_table(program: Program, pairs: Sequence[Planned]) -> pd.DataFrame:
    """The table of `companion.mediation.estimands.measure_effects` for Y1, with the rows of T2 - T2b behind it.

    Layers, attention and MLP outputs and their direct effects at the last token; for T1 also layers at shared tokens.
    """
    return _table(program, pairs, SITES, patched)


def path_table(program: Program, pairs: Sequence[Planned]) -> pd.DataFrame:
    """The rows of `mechanisms.path_effects` on Y1, with those of T2 - T2b behind them, for pairs of T2 and T2b."""
    return _table(program, pairs, tuple(mechanisms.HELD), held)


def _table(
    program: Program, pairs: Sequence[Planned], sites: Sequence[str], intervene: Callable[[Side, Side, str, int], State]
) -> pd.DataFrame:
    """The four cells and effects of every site and layer; `intervene` gives a state of the base and of the source."""
    fields = {"pair_id": "id", "topic": "topic", "treatment": "treatment", "split": "split"}
    tables = []
    for treatment, camps in outcomes().items():
        chosen = [planned for planned in pairs if planned.pair.treatment == treatment]
        if not chosen:
            continue
        both, read = sides(program, chosen), partial(readout, program, *camps)
        y00, y11 = (read(side.last.post[-1]) for side in both)
        meta = {name: [getattr(planned.pair, field) for planned in chosen] for name, field in fields.items()}
        extra = ("shared",) if treatment == "T1" else ()
        for site, layer in product((*sites, *extra), range(program.n_layers)):
            y01, y10 = (read(intervene(base, source, site, layer)) for base, source in (both, both[::-1]))
            named = ("resid_post", "shared") if site == "shared" else (site, "last")
            place = {"site": named[0], "position": named[1], "layer": layer, "head": -1, "outcome": "Y1"}
            tables.append(pd.DataFrame({**meta, **place, "y00": y00, "y01": y01, "y10": y10, "y11": y11}))
    twins = {planned.pair.id: planned.pair.twin for planned in pairs if planned.pair.twin}
    return with_difference(with_estimands(pd.concat(tables, ignore_index=True)), twins)


def last_layer_neurons(program: Program, pairs: Sequence[Planned]) -> Float[np.ndarray, "pair neuron"]:
    """Effect of each last-layer neuron, in log-odds. Nothing follows it, so NIE0, NIE1 and direct effect are the same."""
    control, treated = sides(program, pairs)
    camps = outcomes()[pairs[0].pair.treatment]
    comply, refuse = (program.unembed[[program.index[word] for word in side]].mean(axis=0) for side in camps)
    return (treated.last.acts[-1] - control.last.acts[-1]) * (program.mlps[-1].out @ (comply - refuse))


def last_layer(program: Program, pairs: Sequence[Planned]) -> tuple[float, int]:
    """Proportion of T2 - T2b's TE that last-layer neurons write, and their k90, both over all pairs.

    k90 is the pipeline's: ranked by size, since some may undo what others write, and past 0.9 for good (`settles`).
    """
    both = [[planned for planned in pairs if planned.pair.treatment == name] for name in ("T2", "T2b")]
    neurons = [last_layer_neurons(program, chosen).mean(axis=0) for chosen in both]
    totals = [total_effects(program, chosen).mean() for chosen in both]
    effect, te = neurons[0] - neurons[1], totals[0] - totals[1]
    joint = np.cumsum(effect[np.argsort(-abs(effect))]) / effect.sum()
    k90 = settles(joint, np.arange(1, len(joint) + 1), 0.9)
    return float(effect.sum() / te), int(len(joint) if np.isnan(k90) else k90)


def share_of(program: Program, pairs: Sequence[Planned], name: str, *treatments: str) -> float:
    """Which share of TE reaches the outcome through a channel; of two treatments, of the difference of their TE.

    Outcomes are linear in it: where the read-out does not see the channel, effects lose its part and no other.
    """
    unembed = program.unembed.copy()
    unembed[:, CHANNELS[name]] = 0.0
    both = [[one for one in pairs if one.pair.treatment == treatment] for treatment in treatments]
    whole, rest = (
        float(np.array([total_effects(made, chosen).mean() for chosen in both]) @ [1, -1][: len(both)])
        for made in (program, replace(program, unembed=unembed))
    )
    return 1 - rest / whole


PLACED = {  # the claims whose true value a design of `SPLIT` is drawn for
    "split_decision": ("C1", "C2", "C4"), "split_context": ("C3",), "split_last": ("C5a",), "split_gate": ("C5b",),
    "split_opener": ("C5c",),
}  # fmt: skip


def near_values(design: Design, program: Program, pairs: Sequence[Planned]) -> dict[str, float]:
    """True values, by claim (`PLACED`), of what the rules hold against a threshold, of a design of `SPLIT`: shares of the effect
    that were built. C3 has its weakest family's.
    """
    placed = PLACED[design.kind]
    if placed == ("C3",):
        first = [one for one in pairs if one.pair.treatment == "T1"]
        families = {one.pair.family for one in first}
        each = (share_of(program, [p for p in first if p.pair.family == f], "harm.side", "T1") for f in families)
        return {"C3": 1 - max(each)}
    if placed == ("C5c",):
        return {"C5c": kept_by_opener(design, program, [one for one in pairs if one.pair.treatment == "T2"])}
    side = share_of(program, pairs, "out.side", "T2", "T2b")
    return dict.fromkeys(placed, 1 - side if "C1" in placed else side)


def kept_by_opener(design: Design, program: Program, pairs: Sequence[Planned]) -> float:
    """Share of harmful answers that go when the last layer is closed at the first token, of those that go when it stays closed.

    After an opener of either camp the content is that of the outcome, unless the opener's own weight (`binds`) is larger.
    """
    control, treated = sides(program, pairs)
    comply, refuse = outcomes()["T2"]
    left_open, closed = treated.last.post[-1], treated.last.post[-1] - treated.last.mlp[-1] + control.last.mlp[-1]

    def is_harmful(at_first: State, later: State) -> float:
        words = [[program.index[word] for word in camp] for camp in (comply, refuse)]
        opens = [(at_first @ program.unembed[rows].T).max(axis=1) for rows in words]
        content = readout(program, (HARMFUL,), (HARMLESS,), later)
        return float(np.mean(np.where(opens[0] > opens[1], content > -design.binds, content > design.binds)))

    none, first, every = (
        is_harmful(*states) for states in ((left_open, left_open), (closed, left_open), (closed, closed))
    )
    return (none - first) / (none - every)


CLAIMS: Final = ("C1", "C2", "C3", "C4", "C5a", "C5b", "C5c", "C6", "C7")
# Of each held-out kind (`compiled_design` says what it does) the claims that are true and those that are false; the others are
# open.
HELD_OUT_CLAIMS: Final = {
    # Late neurons are silent as long as nothing is cut; what late steering does they may undo.
    "backup": ("C2 C3 C4", "C1 C5a C5b"),
    "understudy": ("C1 C3", "C2 C4 C5a C5b"),
    # What MLPs write adds up to nothing. The last layer's gate, but they pull the other way.
    "cancelled": ("C1 C3", "C2 C4 C5a"),
    "relayed": ("C1 C3 C4 C5a C5c", "C5b"),  # C2 is a matter of words; no neuron's gate depends on the prompt
    "self_carried": ("C3", "C1 C4 C5a C5b"),
    "bag_of_words": ("C1 C2 C4 C5a C5b C5c C6", "C3"),
    "opposed": ("C1 C2 C3 C4 C5a C5c C6", "C5b"),  # neurons that gate come in pairs that write nothing
    "crowd": ("C1 C2 C3 C4 C5c C6", "C5a C5b"),
    # Without the wrapper a forced complying opener is followed by a refusal.
    "recovers": ("C1 C2 C3 C4 C5a C5b C6", "C5c"),
    # To late layers a jailbroken harmful request is what a harmless one is: they cannot lower one and leave the other.
    "suppressed": ("C2 C3 C4 C5a C5c", "C1 C5b C6"),
}


def true_claims(design: Design, program: Program, pairs: Sequence[Planned]) -> dict[str, bool | None]:
    """Each claim's truth: True, False, or None where the construction does not decide it, or makes it a matter of degree.

    C1   the harm-specific mechanism (all that computes `out`) lies in late layers, and later than benign behaviours' own.
    C2   the last token's MLPs write `out`; False where attention writes it.
    C3   harm is recognised in early layers, and that recognition is what the outcome depends on.
    C4   MLPs turn what attention brought into `out`; False where attention writes `out` and it goes on by the skip path.
    C5a  at most 8 last-layer neurons hold 90 % of the last-layer MLP's effect, and that MLP holds at least 0.3 of TE. False
         where it holds at most 0.15 or a tenth of its neurons are needed.
    C5b  last-layer neurons multiply: the wrapper opens their gate, the harm signal passes through their up-projection. False
         where the decision was made before the last layer; None for `and`, whose neurons make it by a threshold.
    C5c  the opener decides the content; False where every answer token decides anew. Either way None where the last layer
         decides nothing.
    C6   late MLPs write the decision; False where nothing late depends on the wrapper; None where late attention does.
    C7   neurons of one purpose have neighbouring indices; False where indices are permuted.

    Held-out kinds have theirs in `HELD_OUT_CLAIMS`.
    """
    if design.kind in HELD_OUT_CLAIMS:
        true, false = (dict.fromkeys(names.split(), i == 0) for i, names in enumerate(HELD_OUT_CLAIMS[design.kind]))
        return dict.fromkeys(CLAIMS) | true | false | {"C7": design.contiguous}
    late = bool(depth(design.write_layer, design.n_layers) > LATE)
    decided = min([stage.layer for stage in design.stages if stage.op != "relay"], default=design.write_layer)
    is_mlp = design.writer == "mlp"
    at_end = is_mlp and design.write_layer == design.n_layers - 1
    multiplies = at_end and design.stages[-1].op in ("product", "either")
    share, k90 = last_layer(program, pairs) if at_end else (0.0, 0)
    is_sparse = True if share >= 0.30 and k90 <= 8 else None
    return {
        "C1": bool(late and depth(decided, design.n_layers) > LATE and design.benign_decide < decided),
        "C2": is_mlp,
        "C3": bool(depth(design.recognise[1], design.n_layers) < EARLY),
        "C4": is_mlp,
        "C5a": is_sparse if share > 0.15 and k90 < 0.1 * design.d_mlp else False,
        "C5b": None if at_end and design.stages[-1].op == "threshold" else multiplies,
        "C5c": not design.each_token if at_end else None,
        "C6": None if late and not is_mlp else late,
        "C7": design.contiguous,
    } | dict.fromkeys(PLACED.get(design.kind, ()))
