"""Designs of compiled models, drawn by kind and seed: which component does what, and where.

On the last token heads carry the wrapper's strength ("jail") and the request's danger and hazard in; `harm` is danger times
hazard; a chain of stages turns jail and harm into `out`, which the unembedding reads. A stage is `product` (neurons gated by
jail, whose up-projection reads harm), `threshold` (steep neurons that fire where jail + harm is large), `either` (jail from
either of two heads, times harm), or `relay`; kinds held out when rules were made have further ones (`_held_out`). A smaller
side route leads through other layers, partly through attention, and more of some topics' effect than of others' takes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from scipy.special import ndtri

from companion.base.errors import InputError
from companion.base.thresholds import EARLY, LATE, depth

Op = Literal["product", "threshold", "either", "relay", "backup", "against", "opposed", "open", "erase", "refuse"]
Writer = Literal["mlp", "attention", "copy"]
HELD_OUT: Final = (  # kinds that no rule was made or tuned with
    "backup", "understudy", "cancelled", "relayed", "self_carried", "bag_of_words", "opposed", "crowd", "recovers", "suppressed",
)  # fmt: skip
KINDS: Final = (
    "late", "gated", "and", "or", "distributed", "adjacent", "permuted", "early_carrier", "late_like_benign", "early",
    "middle", "attention", "skip_only", "context_free", "context_unused", "each_token",
    "split_decision", "split_context", "split_last", "split_gate", "split_opener", *HELD_OUT,
)  # fmt: skip
# Kinds whose true value lies near a threshold, and between what limits the share of the side route is drawn for it. Of the
# last it is the quantile of outcomes below which the opener binds.
SPLIT: Final = {
    "split_decision": (0.33, 0.67), "split_context": (0.6, 0.96), "split_last": (0.08, 0.38), "split_gate": (0.12, 0.7),
    "split_opener": (0.45, 0.985),
}  # fmt: skip
# Of "split_opener": the outcome of a typical jailbroken harmful request, and how it varies, in log-odds.
OPENING_MARGIN, SPREAD_OF_MARGINS = 1.5, 0.6


@dataclass(frozen=True)
class Stage:
    """Neurons of one layer that compute `op` of the source channel into the target channel."""

    layer: int
    op: Op
    source: str
    target: str
    neurons: int


@dataclass(frozen=True)
class Side:
    """The side route: a product in the MLP of a layer, written by it or, if `copy` is a layer, copied from the `<end>`
    token by a head there. On average over topics `share` of the decision takes it. Its part of harm is fetched and combined
    where the other part is, or in layer `recognise`.
    """

    share: float
    layer: int
    copy: int | None
    recognise: int | None = None


@dataclass(frozen=True)
class Design:
    """One drawn model. Layers are indices; `effect` is the TE of T2 - T2b that was aimed at, in log-odds."""

    kind: str
    seed: int
    family: str
    n_layers: int
    d_mlp: int
    recognise: tuple[int, int]  # layer of the heads that fetch danger and hazard; of the neurons that combine them
    recognise_unused: bool  # an early copy of the same, which nothing reads
    carry: tuple[int, ...]  # layers of the heads that fetch the wrapper's strength
    stages: tuple[Stage, ...]
    side: Side | None
    writer: Writer
    write_layer: int
    benign_carry: tuple[int, int]
    benign_decide: int
    contiguous: bool
    each_token: bool
    effect: float
    severity: float
    base: float
    skip: float  # share of the outcome that the first stage writes past the later ones
    wrapper_leak: float  # log-odds per unit of wrapper strength, harmful or not
    noise: float
    binds: float = 0.0  # where each token decides: how much the opener counts beside the outcome, in log-odds


def thirds(n_layers: int) -> tuple[list[int], list[int], list[int]]:
    """Early, middle and late layers."""
    at = depth(np.arange(n_layers), n_layers)
    middle = (at >= EARLY) & (at <= LATE)
    return tuple(np.flatnonzero(part).tolist() for part in (at < EARLY, middle, at > LATE))  # type: ignore[return-value]


def draw_design(kind: str, seed: int, effect: float | None = None) -> Design:
    """A random design of a kind; equal arguments give equal designs. Raises InputError for an unknown kind."""
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r} of compiled model; expected one of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, 0, KINDS.index(kind)])
    n_layers = int(rng.integers(6, 10))
    early, middle, late = thirds(n_layers)
    benign = sorted(int(layer) for layer in rng.choice(middle, 3))
    common = Design(
        kind, seed, str(rng.choice(["llama", "qwen2"])), n_layers, 128,
        recognise=(0, int(rng.integers(0, early[-1] + 1))), recognise_unused=False, carry=(late[0],), stages=(), side=None,
        writer="mlp", write_layer=n_layers - 1, benign_carry=(benign[0], benign[1]), benign_decide=benign[2],
        contiguous=bool(rng.random() < 0.5), each_token=kind == "each_token",
        effect=float(rng.uniform(2.0, 4.0)) if effect is None else effect,
        severity=float(rng.uniform(3.0, 4.5)), base=float(rng.uniform(1.0, 2.0)), skip=float(rng.uniform(0, 0.2)),
        wrapper_leak=float(rng.uniform(0, 0.15)), noise=float(rng.uniform(0.5, 1.5)),
    )  # fmt: skip
    if kind in SPLIT:
        return _split(common, rng, middle, late)
    if kind in HELD_OUT:
        return _held_out(common, rng, middle, late)
    made = _of_kind(common, rng, early, middle, late)
    return made if kind.startswith("context") else replace(made, side=_side(made, rng, middle, late))


def _split(d: Design, rng: np.random.Generator, middle: list[int], late: list[int]) -> Design:
    """Two ways of one kind each, the side route with a share near a rule's threshold (`SPLIT`).

    split_decision: late MLPs decide, beside middle ones at the `<end>` token whose result attention fetches (C1, C2, C4).
    split_context: harm is recognised early, and the rest of it late (C3). split_last: the decision is made in the middle,
    beside last-layer neurons (C5a). split_gate: last-layer neurons pass on what the middle decided, and others multiply (C5b).
    split_opener: the last layer decides; what follows the opener depends on it and on the outcome (C5c).
    """
    share, last = float(rng.uniform(*SPLIT[d.kind])), d.n_layers - 1
    sizes = [int(rng.integers(2, n)) for n in (7, 4)]

    def decides(layer: int) -> Design:
        stage = Stage(layer, "product", "jail", "out", sizes[0])
        return replace(d, stages=(stage,), write_layer=layer, skip=0.0)

    if d.kind == "split_decision":
        return replace(decides(int(rng.choice(late))), side=Side(share, int(rng.choice(middle)), late[0]))
    if d.kind == "split_context":
        return replace(decides(last), side=Side(share, last, None, recognise=late[0]))
    if d.kind == "split_last":
        middle_one = int(rng.choice(middle))
        return replace(decides(middle_one), carry=(middle[0],), side=Side(share, last, None))
    if d.kind == "split_gate":
        product = Stage(int(rng.choice(middle)), "product", "jail", "stage0", sizes[0])
        passes = Stage(last, "relay", "stage0", "out", sizes[1])
        return replace(d, carry=(middle[0],), stages=(product, passes), skip=0.0, side=Side(share, last, None))
    effect = d.severity - d.base + OPENING_MARGIN
    binds = OPENING_MARGIN + SPREAD_OF_MARGINS * float(ndtri(share))
    return replace(decides(last), each_token=True, effect=effect, binds=max(binds, 0.0))


def _held_out(d: Design, rng: np.random.Generator, middle: list[int], late: list[int]) -> Design:
    """Mechanisms that no other kind has, most of which look like one for which a claim holds.

    backup: middle neurons decide; late ones would do the same, but what the middle wrote shuts them. understudy: attention
    decides, last-layer neurons would. cancelled: attention decides, one late MLP writes as much and the last takes it away.
    relayed: attention decides, last-layer neurons that are always open copy it. self_carried: a middle MLP decides, and a
    late head that looks at its own token copies it. bag_of_words: early layers see which words there are, late ones what
    they belong to. opposed: last-layer neurons pass on a decision beside pairs that gate and cancel. crowd: the same with
    many that pass it on. recovers: a refusing opener binds, after a complying one the answer is decided again.
    suppressed: in the middle a wrapper erases all that was recognised, and last-layer neurons refuse what is left.
    """
    last, before, sizes = d.n_layers - 1, int(rng.choice(late[:-1])), [int(rng.integers(2, n)) for n in (7, 7, 4)]

    def stage(layer: int, op: Op, source: str = "jail", target: str = "out", neurons: int = sizes[1]) -> Stage:
        return Stage(layer, op, source, target, neurons)

    def product(layer: int, target: str = "out") -> Stage:
        return stage(layer, "product", target=target, neurons=sizes[0])

    by_attention = {"writer": "attention", "write_layer": before}
    passed_on = (product(before, "stage0"), stage(last, "opposed", neurons=4))
    copied = product(middle[0], "stage0")
    in_middle, anywhere = {"carry": (middle[0],)}, int(rng.choice(late))
    erases = (
        stage(middle[1], "erase", target="harm", neurons=2 * sizes[0]),
        *(stage(middle[1], "open", word, word) for word in ("danger", "hazard")),
    )
    changes: dict[str, dict[str, Any]] = {
        "backup": in_middle | {"write_layer": middle[1], "stages": (product(middle[1]), stage(anywhere, "backup"))},
        "understudy": by_attention | {"carry": (middle[-1],), "stages": (stage(last, "backup"),)},
        "cancelled": by_attention | {"stages": (product(late[0]), stage(last, "against"))},
        "relayed": by_attention | {"carry": (), "stages": (stage(last, "open", "stage0"),)},
        "self_carried": in_middle | {"writer": "copy", "write_layer": anywhere, "stages": (copied,)},
        "bag_of_words": {"recognise": (late[0], late[0]), "recognise_unused": True, "stages": (product(last),)},
        "opposed": {"stages": (*passed_on, stage(last, "relay", "stage0", neurons=sizes[2]))},
        "crowd": {"stages": (*passed_on, stage(last, "relay", "stage0", neurons=0))},
        "recovers": {"each_token": True, "severity": d.base + d.effect - OPENING_MARGIN, "stages": (product(last),)},
        "suppressed": in_middle | {"severity": 0.0, "stages": (*erases, stage(last, "refuse", "harm"))},
    }
    made = replace(d, skip=0.0, **changes[d.kind])
    alone = made.writer == "attention" or d.kind in ("bag_of_words", "suppressed")  # A side route would blur the truth.
    return made if alone else replace(made, side=_side(made, rng, middle, late))


def _side(design: Design, rng: np.random.Generator, middle: list[int], late: list[int]) -> Side:
    """Where the mechanism is not: in middle layers if that is late, else in late ones; by MLP if attention writes."""
    layers = middle if depth(design.write_layer, design.n_layers) > LATE and design.writer != "attention" else late
    by_attention = design.writer == "mlp" and rng.random() < 0.5
    product = int(rng.choice(layers[:-1]))
    copy = int(rng.choice([layer for layer in layers if layer > product])) if by_attention else None
    return Side(float(rng.uniform(0.05, 0.3)), product, copy)


def _of_kind(d: Design, rng: np.random.Generator, early: list[int], middle: list[int], late: list[int]) -> Design:
    if d.kind in ("late", "distributed", "adjacent", "permuted", "late_like_benign", "early_carrier", "each_token"):
        n, is_large = int(rng.integers(2, len(late) + 1)), d.kind in ("adjacent", "permuted")
        layers = sorted([*rng.choice(late[:-1], n - 1, replace=False).tolist(), late[-1]])
        sizes = [int(rng.integers(24, 41) if is_large else rng.integers(2, 7)) for _ in layers]
        if d.kind == "distributed":
            sizes[-1] = 0
        d = replace(d, stages=_chain(layers, sizes, "product", 0))
        if d.kind == "early_carrier":
            return replace(d, carry=(int(rng.choice(early + middle)),))
        if is_large:
            return replace(d, contiguous=d.kind == "adjacent")
        is_like_benign = d.kind == "late_like_benign"
        return replace(d, benign_carry=(late[0], late[0]), benign_decide=layers[0]) if is_like_benign else d
    if d.kind in ("gated", "and", "or"):
        # The decision is made in last-layer neurons; jail may be relayed by MLPs on its way there.
        decision: Op = "product" if d.kind == "gated" else "threshold" if d.kind == "and" else "either"
        n = 0 if d.kind == "or" else int(rng.integers(0, len(late)))
        layers = sorted(rng.choice(late[:-1], n, replace=False).tolist())
        sizes = [*(int(rng.integers(2, 7)) for _ in layers), 2 * int(rng.integers(1, 4))]
        stages = _chain([*layers, d.n_layers - 1], sizes, decision, -1)
        return replace(d, carry=(late[0], late[1]) if d.kind == "or" else d.carry, stages=stages, skip=0.0)
    if d.kind in ("early", "middle"):
        is_early = d.kind == "early"
        layers = early[1:] if is_early else middle
        layers = sorted(rng.choice(layers, int(rng.integers(1, len(layers) + 1)), replace=False).tolist())
        carry = int(rng.integers(early[0], early[-1])) if is_early else middle[0]
        stages = _chain(layers, [int(rng.integers(2, 7)) for _ in layers], "product", 0)
        recognise = (0, 0) if is_early else d.recognise
        return replace(d, recognise=recognise, write_layer=layers[-1], carry=(carry,), stages=stages)
    if d.kind == "attention":
        return replace(d, writer="attention", write_layer=int(rng.choice(late)), carry=(), skip=0.0)
    if d.kind == "skip_only":
        product = int(rng.choice(middle[:-1] or middle))
        write = int(rng.choice([layer for layer in (*middle, *late) if layer > product]))
        stages = (Stage(product, "product", "jail", "stage0", int(rng.integers(2, 7))),)
        return replace(d, writer="copy", carry=(product,), stages=stages, write_layer=write, skip=0.0)
    last = Stage(d.n_layers - 1, "product", "jail", "out", int(rng.integers(2, 7)))
    unused = d.kind == "context_unused"
    return replace(d, recognise=(late[0], late[0]), recognise_unused=unused, stages=(last,), skip=0.0)


def _chain(layers: list[int], sizes: list[int], op: Op, at: int) -> tuple[Stage, ...]:
    """Relays of jail from layer to layer, but for one of them, `at`, that does `op`; the last writes `out`."""
    ops: list[Op] = ["relay"] * len(layers)
    ops[at] = op
    targets = [*(f"stage{i}" for i in range(len(layers) - 1)), "out"]
    return tuple(map(Stage, layers, ops, ["jail", *targets[:-1]], targets, sizes))
