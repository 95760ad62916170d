"""The program of a compiled model (`compiled_design`): heads, neurons and read-out in channels.

A program says everything about a model except how it is put into a real architecture (`compiled.write_model`). Its arithmetic
is the truth (`compiled_truth`): channel `bias` is 1 there, and no norm divides by anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal
from zlib import crc32

import numpy as np
from jaxtyping import Float

from organisms.compiled_design import KINDS, Design, Stage
from organisms.compiled_language import BEHAVIOURS, COMPLY, HARMFUL, HARMLESS, REFUSE, cue_words, openers, vocabulary

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
    value, out = (np.stack([channel({name: 1.0}) for name in names]) for names in (routes, routes.values()))
    return Head(layer, look, value, out.T)


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
    made = [copy_head(fetch, "verb", {"verb": "danger"})]
    made.append(copy_head(fetch, "object", both if later is None else {"object": "hazard"}))
    if later is not None:
        made.append(copy_head(later, "verb", {"verb": "danger.unused"}))
        made.append(copy_head(later, "object", {"object.side": "hazard.side"}))
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
        cues = [f"{stem}{b}" for b in range(group, BEHAVIOURS, 2) for stem in ("cue", "present")]
        made.append(copy_head(layer, "cue", {f"{cue}.word": cue for cue in cues}))
    if design.writer == "copy":
        look: Look = "self" if design.kind == "self_carried" else "end"
        made.append(copy_head(design.write_layer, look, {"stage0": "out"}))
    if design.writer == "attention":
        target = "stage0" if design.kind == "relayed" else "out"
        head = copy_head(design.write_layer, "conjunction", {"wrapper": target})
        made.append(replace(head, steep=rng.uniform(7, 10), threshold=rng.uniform(0.45, 0.55)))
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
    written = {"mlp": "out", "copy": "stage0", "attention": "jail"}[design.writer]
    mlps = tuple(_layer(design, block, rng) for block in blocks)
    return mlps, design.effect / level.get(written, TYPICAL_JAIL)


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
    """Blocks in random order, contiguous or scattered; the other neurons mix noise through silu alone, and so keep it small."""
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
