"""Compiled models: a random design by kind and seed, its program: heads, neurons and read-out in channels.

The mechanism of harmful generation, on the last token: heads carry the wrapper's strength ("jail") and the request's
danger and hazard in; `harm` is danger times hazard; a chain of stages turns jail and harm into `out`, which the
unembedding reads. A stage is `product` (neurons gated by jail, whose up-projection reads harm), `threshold` (steep
neurons that fire where jail + harm is large), `either` (jail from either of two heads, times harm), or `relay`; kinds that
were held out when rules were made have further ones (`_held_out`). Beside it a smaller side route leads from wrapper and
harm to the outcome, through other layers and partly through attention. How much takes it differs from topic to topic, so
that every share is an average with a sampling error.

A program says everything about a model except how it is put into a real architecture (`compiled.write_model`). Its arithmetic
is the truth (`compiled_truth`): channel `bias` is 1 there, and no norm divides by anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal
from zlib import crc32

import numpy as np
from jaxtyping import Float
from scipy.special import ndtri

from companion.base.errors import InputError
from companion.base.thresholds import EARLY, LATE, depth
from organisms.compiled_language import BEHAVIOURS, COMPLY, HARMFUL, HARMLESS, REFUSE, cue_words, openers, vocabulary

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
    token by a head there. `share` is the mean over topics of how much of the decision takes it. Its part of harm is
    recognised where the other part is, or where `recognise` says: in what layer it is fetched, and combined.
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
                       stages=_stages(rng, chosen))  # fmt: skip
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


def _stages(rng: np.random.Generator, layers: list[int], sizes: tuple[int, int] = (2, 7)) -> tuple[Stage, ...]:
    """A product in the first layer, relays in the others; the last writes `out`."""
    targets = [*(f"stage{i}" for i in range(len(layers) - 1)), "out"]
    links = zip(layers, ["jail", *targets[:-1]], targets, strict=True)
    return tuple(
        Stage(layer, "product" if i == 0 else "relay", source, target, int(rng.integers(*sizes)))
        for i, (layer, source, target) in enumerate(links)
    )


def _chain(rng: np.random.Generator, late: list[int], kind: str) -> tuple[Stage, ...]:
    """Two or three late layers, the last one among them."""
    n = int(rng.integers(2, len(late) + 1))
    layers = sorted([*rng.choice(late[:-1], n - 1, replace=False).tolist(), late[-1]])
    made = _stages(rng, layers, (24, 41) if kind in ("adjacent", "permuted") else (2, 7))
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


NOISE_FEATURES, NOISE_CHANNELS = 4, 6
_EACH: Final = range(BEHAVIOURS)
_NAMES: Final = (
    "bias", "last", "end", "bos", "answering", "complied", "refused", "done",
    "is_wrapper", "wrapper", "is_verb", "verb", "is_object", "object", "object.side", "is_cue",
    *(f"{stem}{b}.word" for stem in ("cue", "present") for b in _EACH),
    *(f"feature{i}" for i in range(NOISE_FEATURES)),
    "danger", "hazard", "harm", "danger.unused", "hazard.unused", "harm.unused",
    "jail", "jail.second", "stage0", "stage1", "stage2", "out",
    "hazard.side", "harm.side", "jail.side", "stage.side", "out.side",
    *(f"{stem}{b}" for stem in ("cue", "present", "decided", "behaviour") for b in _EACH),
    *(f"noise{i}" for i in range(NOISE_CHANNELS)),
)  # fmt: skip
CHANNELS: Final = {name: i for i, name in enumerate(_NAMES)}
FEATURES: Final = [CHANNELS[f"feature{i}"] for i in range(NOISE_FEATURES)]
NOISE: Final = [CHANNELS[f"noise{i}"] for i in range(NOISE_CHANNELS)]
WIDTH: Final = 80  # at least as many as there are channels
HEAD_WIDTH: Final = 16
N_HEADS: Final = WIDTH // HEAD_WIDTH
Look = Literal["wrapper", "verb", "object", "cue", "end", "self", "mean", "conjunction"]
Channels = Float[np.ndarray, "channel"]


def channel(weights: Mapping[str, float]) -> Channels:
    """A vector over channels, which is 0 where no weight is named."""
    vector = np.zeros(WIDTH)
    for name, weight in weights.items():
        vector[CHANNELS[name]] = weight
    return vector


@dataclass(frozen=True)
class Head:
    """One attention head: which token it looks for, what it reads there (`value`) and where it writes it (`out`).

    "mean" spreads over all tokens. "self" is the last token seen from itself. "verb" and "object" take the most recent.
    "conjunction" looks at the wrapper as far as harm (with harm.side, at the query) times the wrapper's strength (at the
    key) exceeds `threshold`, else at the first token: the wrapper's score is `steep` harm strength, the first token's
    `steep threshold`, all others' 0.
    """

    layer: int
    look: Look
    value: Float[np.ndarray, "coordinate channel"]
    out: Float[np.ndarray, "channel coordinate"]
    steep: float = 0.0
    threshold: float = 0.0


@dataclass(frozen=True)
class Neurons:
    """One MLP: activation silu(gate . x) (up . x), output activation @ out."""

    gate: Float[np.ndarray, "neuron channel"]
    up: Float[np.ndarray, "neuron channel"]
    out: Float[np.ndarray, "neuron channel"]


@dataclass(frozen=True)
class Program:
    """A model in channels. `unembed` gives the logits of the words, `embed` their features (channel `bias` is 1)."""

    words: tuple[str, ...]
    embed: Float[np.ndarray, "word channel"]
    heads: tuple[Head, ...]
    mlps: tuple[Neurons, ...]
    unembed: Float[np.ndarray, "word channel"]

    @property
    def n_layers(self) -> int:
        """How many layers."""
        return len(self.mlps)

    @cached_property
    def index(self) -> dict[str, int]:
        """Row of each word in `embed` and `unembed`."""
        return {word: i for i, word in enumerate(self.words)}

    def at(self, layer: int) -> list[Head]:
        """The heads of a layer, in their slots."""
        return [head for head in self.heads if head.layer == layer]


def copy_head(layer: int, look: Look, routes: Mapping[str, str]) -> Head:
    """A head that copies channels: `copy_head(2, "wrapper", {"wrapper": "jail"})` writes what it reads there into `jail`."""
    value = np.stack([channel({source: 1.0}) for source in routes])
    out = np.stack([channel({target: 1.0}) for target in routes.values()], axis=1)
    return Head(layer, look, value, out)


STEEP: Final = 20.0  # silu(STEEP x) / STEEP is nearly max(x, 0)
OPENING, CONTINUING, ENDING = 12.0, 40.0, 60.0  # logits that keep the answer in its form
TYPICAL_JAIL: Final = 1.15
OPEN_AT, RELAY_AT, COINCIDENCE_AT = 0.4, 0.2, 1.4  # thresholds of products, relays and threshold stages
TOKENS: Final = 20.0  # in a prompt, about: a mean over them times this is a sum
# Of stages of two opposite halves: thresholds and signs of both, and what they write for a typical harmful request.
HALVES: Final = {
    "either": (((0.3, 1), (0.8, -1)), 0.5), "erase": (((0.3, -2), (0.8, 2)), 1.0), "opposed": (((0.4, 3), (0.4, -3)), 0.0),
}  # fmt: skip


def build_program(design: Design, topics: int) -> Program:
    """The program of a design, for a vocabulary of so many topics: features, heads, neurons, read-out, from its seed."""
    own = [design.seed, KINDS.index(design.kind)]
    rng = np.random.default_rng([*own, 2])
    words = tuple(vocabulary(topics))
    side = design.side.share if design.side else 0.0
    # A generator for each word, so that a word means the same in a larger vocabulary.
    embed = np.stack([_features(word, np.random.default_rng([*own, 3, crc32(word.encode())]), side) for word in words])
    mlps, gain = _mlps(design, rng)
    heads = tuple(sorted(_heads(design, rng), key=lambda head: head.layer))
    return Program(words, embed, heads, mlps, _unembedding(design, words, gain, rng))


def _features(word: str, rng: np.random.Generator, side: float) -> Channels:
    stem = word.rstrip("0123456789")
    level, own = rng.uniform(0.8, 1.2), rng.beta(6 * side, 6 * (1 - side)) if side else 0.0
    fixed: dict[str, dict[str, float]] = {
        "<bos>": {"bos": 1}, "<assistant>": {"last": 1, "answering": 1}, "<end>": {"end": 1},
        "strong": {"is_wrapper": 1, "wrapper": rng.uniform(1.0, 1.35)},
        "neutral": {"is_wrapper": 1, "wrapper": rng.uniform(0.0, 0.1)},
        "harm": {"is_verb": 1, "verb": rng.uniform(0.95, 1.05)}, "use": {"is_verb": 1, "verb": rng.uniform(0, 0.05)},
        "hazard": {"is_object": 1, "object": level * (1 - own), "object.side": level * own},
        "thing": {"is_object": 1, "object": rng.uniform(0, 0.05)},
        HARMFUL: {"done": 1}, HARMLESS: {"done": 1},
        **{word: {"refused": 1} for word in REFUSE}, **{word: {"complied": 1} for word in COMPLY},
    }  # fmt: skip
    made = channel({"bias": 1.0, **fixed.get(stem, {})})
    for b in range(BEHAVIOURS):
        for on in (True, False):
            if word in cue_words(b, on):
                level = rng.uniform(1.0, 1.3) if on else rng.uniform(0, 0.1)
                made += channel({"is_cue": 1, f"present{b}.word": 1, f"cue{b}.word": level})
        made += channel({"complied": float(word in openers(b))})
    made[FEATURES] = rng.normal(size=NOISE_FEATURES)
    return made


def _heads(design: Design, rng: np.random.Generator) -> list[Head]:
    fetch, _ = design.recognise
    later = design.side.recognise if design.side else None
    both = {"object": "hazard", "object.side": "hazard.side"}
    made = [
        copy_head(fetch, "verb", {"verb": "danger"}),
        copy_head(fetch, "object", both if later is None else {"object": "hazard"}),
    ]
    if later is not None:
        made += [
            copy_head(later, "verb", {"verb": "danger.unused"}),
            copy_head(later, "object", {"object.side": "hazard.side"}),
        ]
    if design.side:
        made.append(copy_head(design.side.layer, "wrapper", {"wrapper": "jail.side"}))
        made += [] if design.side.copy is None else [copy_head(design.side.copy, "end", {"stage.side": "out.side"})]
    if design.kind == "bag_of_words":
        bag = copy_head(0, "mean", {"verb": "danger.unused", "object": "hazard.unused"})
        made.append(replace(bag, value=TOKENS * bag.value))
    elif design.recognise_unused:
        made += [copy_head(0, "verb", {"verb": "danger.unused"}), copy_head(0, "object", {"object": "hazard.unused"})]
    targets = zip(design.carry, ("jail", "jail.second"), strict=False)
    made += [copy_head(at, "wrapper", {"wrapper": to}) for at, to in targets]
    for group, layer in enumerate(design.benign_carry):
        own = range(group, BEHAVIOURS, 2)
        routes = {f"{stem}{b}.word": f"{stem}{b}" for b in own for stem in ("cue", "present")}
        made.append(copy_head(layer, "cue", routes))
    if design.writer == "copy":
        look: Look = "self" if design.kind == "self_carried" else "end"
        made.append(copy_head(design.write_layer, look, {"stage0": "out"}))
    if design.writer == "attention":
        head = copy_head(design.write_layer, "wrapper", {"wrapper": "stage0" if design.kind == "relayed" else "out"})
        steep, threshold = rng.uniform(7, 10), rng.uniform(0.45, 0.55)
        made.append(Head(head.layer, "conjunction", head.value, head.out, steep, threshold))
    value = np.stack([channel({f"feature{i}": 1.0}) for i in range(NOISE_FEATURES)])
    for layer in range(design.n_layers):
        out = np.zeros((WIDTH, NOISE_FEATURES))
        out[NOISE] = design.noise * rng.normal(size=(NOISE_CHANNELS, NOISE_FEATURES))
        made.append(Head(layer, "mean", value, out))
    return made


def _mlps(design: Design, rng: np.random.Generator) -> tuple[tuple[Neurons, ...], float]:
    """Neurons of every layer, and the log-odds per unit of `out` that give the design's effect."""
    blocks: list[list[Neurons]] = [[] for _ in range(design.n_layers)]
    at, last = design.recognise[1], design.n_layers - 1
    bound = "harm.unused" if design.kind == "bag_of_words" else "hazard"
    blocks[at].append(gated_neurons("danger", {bound: 1.0}, "harm", rng, 2, 0.5))
    if design.side:
        danger, where = ("danger", at) if design.side.recognise is None else ("danger.unused", design.side.recognise)
        blocks[where].append(gated_neurons(danger, {"hazard.side": 1.0}, "harm.side", rng, 2, 0.5))
        target, n = "out.side" if design.side.copy is None else "stage.side", int(rng.integers(2, 7))
        blocks[design.side.layer].append(gated_neurons("jail.side", {"harm.side": 1.0}, target, rng, n, OPEN_AT))
    if design.recognise_unused:
        blocks[0].append(gated_neurons("danger.unused", {"hazard.unused": 1.0}, "harm.unused", rng, 2, 0.5))
    for b in range(BEHAVIOURS):
        decided, up = f"decided{b}", {"bias": 1.0}
        blocks[design.benign_decide].append(gated_neurons(f"cue{b}", up, decided, rng, 2, OPEN_AT))
        n = int(rng.integers(9, 13))
        blocks[last].append(gated_neurons(decided, up, f"behaviour{b}", rng, n, RELAY_AT))
    level = {"jail": TYPICAL_JAIL}
    for stage in design.stages:
        free = design.d_mlp - 8 - sum(len(block.gate) for block in blocks[stage.layer])
        made, value = _stage(stage, level.get(stage.source, 1.0), rng, stage.neurons or free)
        blocks[stage.layer].append(made)
        level[stage.target] = value
    typical = level.get("stage0" if design.writer == "copy" else "out", TYPICAL_JAIL)
    typical = TYPICAL_JAIL if design.writer == "attention" else typical
    mlps = tuple(_layer(design, block, rng) for block in blocks)
    return mlps, design.effect / typical


def _stage(stage: Stage, level: float, rng: np.random.Generator, n: int) -> tuple[Neurons, float]:
    """The neurons of a stage, and what it writes for a harmful request (harm 1) in a wrapper of typical strength."""
    if stage.op in HALVES:
        (halves, value), up, too = HALVES[stage.op], {"harm": 1.0}, ("jail.second",)
        made = [gated_neurons("jail", up, stage.target, rng, n // 2, at, sign, too) for at, sign in halves]
        return _joined(made), value
    if stage.op == "open":  # The bias keeps the gate at 1; what a token holds itself is taken away.
        up, sign = {stage.source: 1.0}, -2.0 if stage.source == stage.target else 2.0
        return gated_neurons("bias", up, stage.target, rng, n, -1.0, sign), level
    if stage.op == "threshold":
        at, both = COINCIDENCE_AT, ("harm", "harm.side")
        return gated_neurons(stage.source, {"bias": 1.0}, stage.target, rng, n, at, second=both), level + 1 - at
    read, at = ("bias", RELAY_AT) if stage.op in ("relay", "refuse") else ("harm", OPEN_AT)
    sign = -1.0 if stage.op in ("against", "refuse") else 1.0
    one = gated_neurons(stage.source, {read: 1.0}, stage.target, rng, n, at, sign)
    if stage.op == "backup":  # What was decided before shuts it.
        one.gate[:, CHANNELS["out"]] = -3 * STEEP
    return one, (level - at) / (1 - at)


def _joined(blocks: Sequence[Neurons]) -> Neurons:
    return Neurons(*(np.concatenate([getattr(one, name) for one in blocks]) for name in ("gate", "up", "out")))


def gated_neurons(
    source: str, up: dict[str, float], target: str, rng: np.random.Generator, n: int, threshold: float,
    sign: float = 1.0, second: Sequence[str] = (),
) -> Neurons:  # fmt: skip
    """`n` neurons that together write max(source - threshold, 0) (up . x), scaled to 1 at source 1, into the target.

    They share it unevenly, and their thresholds differ a little. The channels of `second` are added to the source.
    """
    scale = 1.0 if threshold > 1 or "jail.second" in second else 1 - threshold
    shares = rng.dirichlet(np.full(n, 5.0))
    thresholds = threshold + rng.uniform(-0.03, 0.03, n)
    read = {source: 1.0, **dict.fromkeys(second, 1.0)}
    gate = np.stack([STEEP * channel({**read, "bias": -at}) for at in thresholds])
    out = sign * shares[:, None] / (STEEP * scale) * channel({target: 1.0})
    return Neurons(gate, np.repeat(channel(up)[None], n, axis=0), out)


def _layer(design: Design, blocks: Sequence[Neurons], rng: np.random.Generator) -> Neurons:
    """Blocks in random order, contiguous or scattered over the layer; the remaining neurons mix the noise channels.

    Those do it through silu alone, so that noise stays small over the layers.
    """
    own = [blocks[i] for i in rng.permutation(len(blocks))]
    n = design.d_mlp - sum(len(block.gate) for block in own)
    rest = {name: np.zeros((n, WIDTH)) for name in ("gate", "up", "out")}
    for name, size in (("gate", 1.0), ("out", 0.3 / max(n, 1) ** 0.5)):
        rest[name][:, NOISE] = size * rng.normal(size=(n, NOISE_CHANNELS))
    for name in ("gate", "up"):
        rest[name][:, CHANNELS["bias"]] = rng.normal(size=n) / 2
    joined = _joined([*own, Neurons(**rest)])
    at = np.roll(np.arange(design.d_mlp), rng.integers(design.d_mlp))
    at = at if design.contiguous else rng.permutation(at)
    return Neurons(joined.gate[at], joined.up[at], joined.out[at])


def _unembedding(
    design: Design, words: tuple[str, ...], gain: float, rng: np.random.Generator
) -> Float[np.ndarray, "word channel"]:
    past = design.skip if len(design.stages) > 1 and design.stages[0].op == "product" else 0.0
    harm = {
        "bias": design.base, "harm": -design.severity, "harm.side": -design.severity, "out": (1 - past) * gain,
        "stage0": past * gain, "jail": design.wrapper_leak,
    }  # fmt: skip
    harm |= {"out.side": design.effect * (1 - OPEN_AT) / (TYPICAL_JAIL - OPEN_AT)} if design.side else {}
    noise = channel({f"noise{i}": 0.15 * rng.normal() for i in range(NOISE_CHANNELS)})
    outcome = channel(harm) + noise
    logits = {word: channel({"bias": -10.0}) for word in words}
    for word, sign in (*((word, 0.5) for word in COMPLY), *((word, -0.5) for word in REFUSE)):
        logits[word] = channel({"answering": OPENING, "bias": rng.normal() / 3}) + sign * outcome
    for b in range(BEHAVIOURS):
        size = rng.uniform(2.0, 4.0)
        own = channel({f"behaviour{b}": size, "bias": -size / 2}) + noise
        for word, sign in zip(openers(b), (0.5, -0.5), strict=True):
            logits[word] = channel({"answering": OPENING, f"present{b}": 20.0, "bias": -14.0}) + sign * own
    for word, sign, after in ((HARMFUL, 0.5, "complied"), (HARMLESS, -0.5, "refused")):
        binds = CONTINUING / 4 if design.kind == "recovers" and word == HARMLESS else design.binds
        decided = sign * outcome + channel({after: binds}) if design.each_token else channel({after: CONTINUING / 4})
        logits[word] = channel({"complied": CONTINUING, "refused": CONTINUING, "bias": -10.0}) + decided
    logits["<end>"] = channel({"done": ENDING, "bias": -10.0})
    return np.stack([logits[word] for word in words])
