"""Random designs of compiled models: which layers and neurons do what, drawn by kind and seed.

The mechanism of harmful generation, on the last token: heads carry the wrapper's strength ("jail") and the request's
danger and hazard in; `harm` is danger times hazard; a chain of stages turns jail and harm into `out`, which the
unembedding reads. A stage is `product` (neurons gated by jail, whose up-projection reads harm), `threshold` (steep
neurons that fire where jail + harm is large), `either` (jail from either of two heads, times harm), or `relay`.

Beside it a smaller side route leads from wrapper and harm to the outcome, through other layers and partly through
attention. How much takes it differs from topic to topic, so that every share is an average with a sampling error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from helpers.depth import EARLY, LATE, depth
from helpers.errors import InputError

Op = Literal["product", "threshold", "either", "relay"]
Writer = Literal["mlp", "attention", "copy"]
KINDS: Final = (
    "late", "gated", "and", "or", "distributed", "adjacent", "permuted", "early_carrier", "late_like_benign", "early",
    "middle", "attention", "skip_only", "context_free", "context_unused", "each_token",
)  # fmt: skip


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
    token by a head there. `share` is the mean over topics of how much of the decision takes it.
    """

    share: float
    layer: int
    copy: int | None


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

    @property
    def recognised_early(self) -> bool:
        """Harm is known at the last token within the early layers."""
        return bool(depth(self.recognise[1], self.n_layers) < EARLY)


def thirds(n_layers: int) -> tuple[list[int], list[int], list[int]]:
    """Early, middle and late layers.

    >>> thirds(6)
    ([0, 1], [2, 3], [4, 5])
    """
    at = depth(np.arange(n_layers), n_layers)
    middle = (at >= EARLY) & (at <= LATE)
    return tuple(np.flatnonzero(part).tolist() for part in (at < EARLY, middle, at > LATE))  # type: ignore[return-value]


def draw_design(kind: str, seed: int, effect: float | None = None) -> Design:
    """A random design of a kind; equal arguments give equal designs.

    Raises InputError for an unknown kind.
    """
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
    made = _of_kind(common, rng, early, middle, late)
    return made if kind.startswith("context") else replace(made, side=_side(made, rng, middle, late))


def _side(design: Design, rng: np.random.Generator, middle: list[int], late: list[int]) -> Side:
    """Where the mechanism is not: in middle layers if that is late, else in late ones; by MLP if attention writes."""
    layers = middle if depth(design.write_layer, design.n_layers) > LATE and design.writer != "attention" else late
    by_attention = design.writer == "mlp" and rng.random() < 0.5
    product = int(rng.choice(layers[:-1]))
    copy = int(rng.choice([layer for layer in layers if layer > product])) if by_attention else None
    return Side(float(rng.uniform(0.05, 0.3)), product, copy)


def _of_kind(d: Design, rng: np.random.Generator, early: list[int], middle: list[int], late: list[int]) -> Design:
    if d.kind in ("late", "distributed", "adjacent", "permuted", "late_like_benign", "early_carrier", "each_token"):
        d = replace(d, stages=_chain(rng, late, d.kind))
        if d.kind == "early_carrier":
            return replace(d, carry=(int(rng.choice(early + middle)),))
        if d.kind in ("adjacent", "permuted"):
            return replace(d, contiguous=d.kind == "adjacent")
        decide = d.stages[0].layer
        return replace(d, benign_carry=(late[0], late[0]), benign_decide=decide) if "benign" in d.kind else d
    if d.kind in ("gated", "and", "or"):
        return _last_layer(d, rng, late)
    if d.kind in ("early", "middle"):
        layers = early[1:] if d.kind == "early" else middle
        chosen = sorted(rng.choice(layers, int(rng.integers(1, len(layers) + 1)), replace=False).tolist())
        d = replace(d, recognise=(0, 0) if d.kind == "early" else d.recognise, write_layer=chosen[-1])
        return replace(d, carry=(int(rng.integers(early[0], early[-1])) if d.kind == "early" else middle[0],),
                       stages=_stages(rng, chosen, "product"))  # fmt: skip
    if d.kind == "attention":
        return replace(d, writer="attention", write_layer=int(rng.choice(late)), carry=(), skip=0.0)
    if d.kind == "skip_only":
        product = int(rng.choice(middle[:-1] or middle))
        write = int(rng.choice([layer for layer in (*middle, *late) if layer > product]))
        stages = (Stage(product, "product", "jail", "stage0", int(rng.integers(2, 7))),)
        return replace(d, writer="copy", carry=(product,), stages=stages, write_layer=write, skip=0.0)
    last = Stage(d.n_layers - 1, "product", "jail", "out", int(rng.integers(2, 7)))
    return replace(
        d, recognise=(late[0], late[0]), recognise_unused=d.kind == "context_unused", stages=(last,), skip=0.0
    )


def _stages(
    rng: np.random.Generator, layers: list[int], first: Op, sizes: tuple[int, int] = (2, 7)
) -> tuple[Stage, ...]:
    """A product in the first layer, relays in the others; the last writes `out`."""
    targets = [*(f"stage{i}" for i in range(len(layers) - 1)), "out"]
    sources = ["jail", *targets[:-1]]
    ops: list[Op] = [first, *(["relay"] * (len(layers) - 1))]  # type: ignore[list-item]
    return tuple(
        Stage(layer, op, source, target, int(rng.integers(*sizes)))
        for layer, op, source, target in zip(layers, ops, sources, targets, strict=True)
    )


def _chain(rng: np.random.Generator, late: list[int], kind: str) -> tuple[Stage, ...]:
    """Two or three late layers, the last one among them."""
    n = int(rng.integers(2, len(late) + 1))
    layers = sorted([*rng.choice(late[:-1], n - 1, replace=False).tolist(), late[-1]])
    made = _stages(rng, layers, "product", (24, 41) if kind in ("adjacent", "permuted") else (2, 7))
    return (*made[:-1], replace(made[-1], neurons=0)) if kind == "distributed" else made


def _last_layer(d: Design, rng: np.random.Generator, late: list[int]) -> Design:
    """The decision itself in last-layer neurons; jail may be relayed by MLPs on its way there."""
    op: Op = {"gated": "product", "and": "threshold", "or": "either"}[d.kind]  # type: ignore[assignment]
    n_relays = 0 if op == "either" else int(rng.integers(0, len(late)))
    layers = sorted(rng.choice(late[:-1], n_relays, replace=False).tolist())
    relays = tuple(
        Stage(layer, "relay", "jail" if i == 0 else f"stage{i - 1}", f"stage{i}", int(rng.integers(2, 7)))
        for i, layer in enumerate(layers)
    )
    source = relays[-1].target if relays else "jail"
    decision = Stage(d.n_layers - 1, op, source, "out", 2 * int(rng.integers(1, 4)))
    carry = (late[0], late[1]) if op == "either" else d.carry
    return replace(d, carry=carry, stages=(*relays, decision), skip=0.0)
