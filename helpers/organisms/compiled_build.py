"""From a design to a program: the words' features, heads, neurons and read-out in numbers, all drawn from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from zlib import crc32

import numpy as np
from jaxtyping import Float

from helpers.organisms import compiled_language as lang
from helpers.organisms.compiled_design import KINDS, Design, Stage
from helpers.organisms.compiled_program import (
    CHANNELS,
    NOISE_CHANNELS,
    NOISE_FEATURES,
    WIDTH,
    Head,
    Neurons,
    Program,
    channel,
    copy,
)

STEEP: Final = 20.0  # silu(STEEP x) / STEEP is nearly max(x, 0)
OPENING, CONTINUING, ENDING = 12.0, 40.0, 60.0  # logits that keep the answer in its form
TYPICAL_JAIL: Final = 1.15
OPEN_AT, RELAY_AT, COINCIDENCE_AT = 0.4, 0.2, 1.4  # thresholds of products, relays and threshold stages


def build(design: Design, topics: int) -> Program:
    """The program of a design, for a vocabulary of so many topics."""
    own = [design.seed, KINDS.index(design.kind)]
    rng = np.random.default_rng([*own, 2])
    words = tuple(lang.vocabulary(topics))
    side = design.side.share if design.side else 0.0
    # A generator for each word, so that a word means the same in a larger vocabulary.
    embed = np.stack([_features(word, np.random.default_rng([*own, 3, crc32(word.encode())]), side) for word in words])
    mlps, gain = _mlps(design, rng)
    heads = tuple(sorted(_heads(design, rng), key=lambda head: head.layer))
    return Program(words, embed, heads, mlps, _unembedding(design, words, gain, rng))


def _features(word: str, rng: np.random.Generator, side: float) -> Float[np.ndarray, "channel"]:
    stem = word.rstrip("0123456789")
    level, own = rng.uniform(0.8, 1.2), rng.beta(6 * side, 6 * (1 - side)) if side else 0.0
    fixed: dict[str, dict[str, float]] = {
        "<bos>": {"bos": 1}, "<assistant>": {"last": 1, "answering": 1}, "<end>": {"end": 1},
        "strong": {"is_wrapper": 1, "wrapper": rng.uniform(1.0, 1.35)},
        "neutral": {"is_wrapper": 1, "wrapper": rng.uniform(0.0, 0.1)},
        "harm": {"is_verb": 1, "verb": rng.uniform(0.95, 1.05)}, "use": {"is_verb": 1, "verb": rng.uniform(0, 0.05)},
        "hazard": {"is_object": 1, "object": level * (1 - own), "object.side": level * own},
        "thing": {"is_object": 1, "object": rng.uniform(0, 0.05)},
        lang.HARMFUL: {"done": 1}, lang.HARMLESS: {"done": 1},
    }  # fmt: skip
    made = channel({"bias": 1.0, **fixed.get(stem, {})})
    for b in range(lang.BEHAVIOURS):
        for on in (True, False):
            if word in lang.cue_words(b, on):
                level = rng.uniform(1.0, 1.3) if on else rng.uniform(0, 0.1)
                made += channel({"is_cue": 1, f"present{b}.word": 1, f"cue{b}.word": level})
    if word in (*lang.COMPLY, *(lang.openers(b)[i] for b in range(lang.BEHAVIOURS) for i in (0, 1))):
        made += channel({"complied": 1})
    if word in lang.REFUSE:
        made += channel({"refused": 1})
    made[[CHANNELS[f"feature{i}"] for i in range(NOISE_FEATURES)]] = rng.normal(size=NOISE_FEATURES)
    return made


def _heads(design: Design, rng: np.random.Generator) -> list[Head]:
    fetch, _ = design.recognise
    made = [
        copy(fetch, "verb", {"verb": "danger"}),
        copy(fetch, "object", {"object": "hazard", "object.side": "hazard.side"}),
    ]
    if design.side:
        made.append(copy(design.side.layer, "wrapper", {"wrapper": "jail.side"}))
        made += [] if design.side.copy is None else [copy(design.side.copy, "end", {"stage.side": "out.side"})]
    if design.recognise_unused:
        made += [copy(0, "verb", {"verb": "danger.unused"}), copy(0, "object", {"object": "hazard.unused"})]
    made += [
        copy(at, "wrapper", {"wrapper": to}) for at, to in zip(design.carry, ("jail", "jail.second"), strict=False)
    ]
    for group, layer in enumerate(design.benign_carry):
        own = range(group, lang.BEHAVIOURS, 2)
        routes = {f"{stem}{b}.word": f"{stem}{b}" for b in own for stem in ("cue", "present")}
        made.append(copy(layer, "cue", routes))
    if design.writer == "copy":
        made.append(copy(design.write_layer, "end", {"stage0": "out"}))
    if design.writer == "attention":
        head = copy(design.write_layer, "wrapper", {"wrapper": "out"})
        steep, threshold = rng.uniform(7, 10), rng.uniform(0.45, 0.55)
        made.append(Head(head.layer, "conjunction", head.value, head.out, steep, threshold))
    for layer in range(design.n_layers):
        value = np.stack([channel({f"feature{i}": 1.0}) for i in range(NOISE_FEATURES)])
        out = np.zeros((WIDTH, NOISE_FEATURES))
        out[_noise()] = design.noise * rng.normal(size=(NOISE_CHANNELS, NOISE_FEATURES))
        made.append(Head(layer, "mean", value, out))
    return made


def _noise() -> list[int]:
    return [CHANNELS[f"noise{i}"] for i in range(NOISE_CHANNELS)]


def _mlps(design: Design, rng: np.random.Generator) -> tuple[tuple[Neurons, ...], float]:
    """Neurons of every layer, and the log-odds per unit of `out` that give the design's effect."""
    blocks: list[list[Neurons]] = [[] for _ in range(design.n_layers)]
    blocks[design.recognise[1]].append(gated("danger", {"hazard": 1.0}, "harm", rng, 2, 0.5))
    if design.side:
        blocks[design.recognise[1]].append(gated("danger", {"hazard.side": 1.0}, "harm.side", rng, 2, 0.5))
        target = "out.side" if design.side.copy is None else "stage.side"
        blocks[design.side.layer].append(
            gated("jail.side", {"harm.side": 1.0}, target, rng, int(rng.integers(2, 7)), OPEN_AT)
        )
    if design.recognise_unused:
        blocks[0].append(gated("danger.unused", {"hazard.unused": 1.0}, "harm.unused", rng, 2, 0.5))
    last = design.n_layers - 1
    for b in range(lang.BEHAVIOURS):
        blocks[design.benign_decide].append(gated(f"cue{b}", {"bias": 1.0}, f"decided{b}", rng, 2, OPEN_AT))
        blocks[last].append(
            gated(f"decided{b}", {"bias": 1.0}, f"behaviour{b}", rng, int(rng.integers(9, 13)), RELAY_AT)
        )
    level = {"jail": TYPICAL_JAIL}
    for stage in design.stages:
        free = design.d_mlp - 8 - sum(len(block.gate) for block in blocks[stage.layer])
        made, value = _stage(stage, level[stage.source], rng, stage.neurons or free)
        blocks[stage.layer].append(made)
        level[stage.target] = value
    typical = level.get("stage0" if design.writer == "copy" else "out", TYPICAL_JAIL)
    mlps = tuple(_layer(design, block, rng) for block in blocks)
    return mlps, design.effect / typical


def _stage(stage: Stage, level: float, rng: np.random.Generator, n: int) -> tuple[Neurons, float]:
    """The neurons of a stage, and what it writes for a harmful request (harm 1) in a wrapper of typical strength."""
    if stage.op == "either":
        up = {"harm": 1.0}
        halves = [
            gated("jail", up, "out", rng, n // 2, at, sign, second=("jail.second",))
            for at, sign in ((0.3, 1), (0.8, -1))
        ]
        joined = Neurons(*(np.concatenate([getattr(half, name) for half in halves]) for name in ("gate", "up", "out")))
        return joined, 0.5
    if stage.op == "threshold":
        return gated(
            stage.source, {"bias": 1.0}, stage.target, rng, n, COINCIDENCE_AT, second=("harm", "harm.side")
        ), level + 1 - COINCIDENCE_AT
    up = {"harm": 1.0} if stage.op == "product" else {"bias": 1.0}
    at = OPEN_AT if stage.op == "product" else RELAY_AT
    return gated(stage.source, up, stage.target, rng, n, at), (level - at) / (1 - at)


def gated(
    source: str, up: dict[str, float], target: str, rng: np.random.Generator, n: int, threshold: float,
    sign: float = 1.0, second: Sequence[str] = (),
) -> Neurons:  # fmt: skip
    """`n` neurons that together write max(source - threshold, 0) (up . x), scaled to 1 at source 1, into the target.

    They share it unevenly, and their thresholds differ a little. The channels of `second` are added to the source.
    """
    scale = 1.0 if threshold > 1 or "jail.second" in second else 1 - threshold
    shares = rng.dirichlet(np.full(n, 5.0))
    gate = np.stack(
        [
            STEEP * channel({source: 1.0, "bias": -at, **dict.fromkeys(second, 1.0)})
            for at in threshold + rng.uniform(-0.03, 0.03, n)
        ]
    )
    out = sign * shares[:, None] / (STEEP * scale) * channel({target: 1.0})
    return Neurons(gate, np.repeat(channel(up)[None], n, axis=0), out)


def _layer(design: Design, blocks: Sequence[Neurons], rng: np.random.Generator) -> Neurons:
    """Blocks in random order, contiguous or scattered over the layer; the remaining neurons are noise."""
    order = rng.permutation(len(blocks))
    own = [blocks[i] for i in order]
    rest = _background(design, design.d_mlp - sum(len(block.gate) for block in own), rng)
    joined = [np.concatenate([getattr(part, name) for part in (*own, rest)]) for name in ("gate", "up", "out")]
    at = np.roll(np.arange(design.d_mlp), rng.integers(design.d_mlp))
    at = at if design.contiguous else rng.permutation(at)
    return Neurons(*(matrix[at] for matrix in joined))


def _background(design: Design, n: int, rng: np.random.Generator) -> Neurons:
    """Neurons that mix the noise channels, through silu alone so that noise stays small over the layers."""
    made = {name: np.zeros((n, WIDTH)) for name in ("gate", "up", "out")}
    for name, size in (("gate", 1.0), ("out", 0.3 / max(n, 1) ** 0.5)):
        made[name][:, _noise()] = size * rng.normal(size=(n, NOISE_CHANNELS))
    for name in ("gate", "up"):
        made[name][:, CHANNELS["bias"]] = rng.normal(size=n) / 2
    return Neurons(**made)


def _unembedding(
    design: Design, words: tuple[str, ...], gain: float, rng: np.random.Generator
) -> Float[np.ndarray, "word channel"]:
    past = design.skip if len(design.stages) > 1 and design.stages[0].op == "product" else 0.0
    harm = {
        "bias": design.base,
        "harm": -design.severity,
        "harm.side": -design.severity,
        "out": (1 - past) * gain,
        "jail": design.wrapper_leak,
    }
    harm |= {"stage0": past * gain} if past else {}
    harm |= {"out.side": design.effect * (1 - OPEN_AT) / (TYPICAL_JAIL - OPEN_AT)} if design.side else {}
    noise = channel({f"noise{i}": 0.15 * rng.normal() for i in range(NOISE_CHANNELS)})
    outcome = channel(harm) + noise
    logits = {word: channel({"bias": -10.0}) for word in words}
    for side, sign in ((lang.COMPLY, 0.5), (lang.REFUSE, -0.5)):
        for word in side:
            logits[word] = channel({"answering": OPENING, "bias": rng.normal() / 3}) + sign * outcome
    for b in range(lang.BEHAVIOURS):
        size = rng.uniform(2.0, 4.0)
        own = channel({f"behaviour{b}": size, "bias": -size / 2}) + noise
        for word, sign in zip(lang.openers(b), (0.5, -0.5), strict=True):
            logits[word] = channel({"answering": OPENING, f"present{b}": 20.0, "bias": -14.0}) + sign * own
    for word, sign, after in ((lang.HARMFUL, 0.5, "complied"), (lang.HARMLESS, -0.5, "refused")):
        decided = sign * outcome if design.each_token else channel({after: CONTINUING / 4})
        logits[word] = channel({"complied": CONTINUING, "refused": CONTINUING, "bias": -10.0}) + decided
    logits["<end>"] = channel({"done": ENDING, "bias": -10.0})
    return np.stack([logits[word] for word in words])
