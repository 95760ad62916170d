"""Hand-made models of gates and contributors, with an interpreter in plain Python that knows all their effects.

As in `handmade`, signals live in channels of their own and a large constant channel keeps every norm's scale nearly fixed.
Cue A puts a bit into FIRST and cue B one into SECOND, at the last token. A `Neuron` is act(gate) * up with a SiLU, its gate
and up linear in the channels, and writes into channels; the log-odds are linear in the channels (`read`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from handmade import BIAS, FIRST, N_LAYERS, OUT, SECOND, SIZE, Program, compiled, word_tokenizer

from companion.model.architecture import Subject
from companion.prompts.tokens import Openers

TOKENIZER = word_tokenizer()
YES_NO = Openers(*((TOKENIZER.convert_tokens_to_ids(word),) for word in ("yes", "no")), 0)
CLOSE = 2e-4  # what a constant channel of 1000 leaves of the norm
MIDDLE = 10  # a channel that only neurons read
ONE = "one"  # the constant, as a key of gate, up and write


@dataclass(frozen=True)
class Neuron:
    """One neuron: weights of its gate, its up projection and what it writes, by channel; `ONE` is a constant."""

    layer: int
    place: int
    gate: Mapping[int | str, float]
    up: Mapping[int | str, float]
    write: Mapping[int, float]


@dataclass(frozen=True)
class Model:
    """Neurons and the weights of the log-odds on the final channels."""

    neurons: tuple[Neuron, ...]
    read: Mapping[int, float] = field(default_factory=lambda: {OUT: 1.0})


OPEN = {ONE: 30.0}  # a gate that is always open: silu(30) = 30
STEEP = 30.0


def silu(x: float) -> float:
    return x / (1 + float(np.exp(-x)))


def step(channel: int, at: float = 0.5) -> dict[int | str, float]:
    """A gate that opens where the channel passes `at`."""
    return {channel: STEEP, ONE: -STEEP * at}


def ramp(layer: int, place: int, source: Mapping[int, float], target: int, at: float = 0.0) -> tuple[Neuron, ...]:
    """Two neurons that write min(max(sum - at, 0), 1) of the source channels, up to the SiLU's roundness."""
    steep: dict[int | str, float] = {channel: STEEP * weight for channel, weight in source.items()}
    return tuple(
        Neuron(layer, place + i, {**steep, ONE: -STEEP * (at + i)}, {ONE: 1.0}, {target: (1, -1)[i] / STEEP})
        for i in range(2)
    )


# A set (layer, neurons) comes with each model: the one that is tested.
ADDITIVE = Model((Neuron(3, 0, OPEN, {FIRST: 1.0}, {OUT: 3.0 / 30}),), {OUT: 1.0, FIRST: 2.0})
INSIDE = Model((Neuron(3, 0, step(FIRST), {ONE: 0.5, SECOND: 1.0}, {OUT: 3.0 / STEEP}),))
# MIDDLE = FIRST; then OUT = 2 * silu(MIDDLE) * SECOND: the neuron below decides whether SECOND gets through.
BELOW = Model(
    (
        Neuron(2, 0, OPEN, {FIRST: 1.0}, {MIDDLE: 1.0 / 30}),
        Neuron(3, 1, step(MIDDLE), {SECOND: 1.0}, {OUT: 4.0 / STEEP}),
    )
)
AND = Model((Neuron(2, 0, OPEN, {FIRST: 1.0}, {MIDDLE: 1 / 30}), *ramp(3, 1, {MIDDLE: 1, SECOND: 1}, OUT, at=1.0)))
OR = Model((Neuron(2, 0, OPEN, {FIRST: 1.0}, {MIDDLE: 1 / 30}), *ramp(3, 1, {MIDDLE: 1, SECOND: 1}, OUT, at=0.0)))
# Writes 1 into OUT itself and 1 into MIDDLE, of which a neuron above makes 3 more.
MIXED = Model(
    (
        Neuron(2, 0, OPEN, {FIRST: 1.0}, {OUT: 1.0 / 30, MIDDLE: 1.0 / 30}),
        Neuron(3, 1, OPEN, {MIDDLE: 1.0}, {OUT: 3.0 / 30}),
    )
)
# Cue A is the wrapper, cue B the harm: the wrapper opens the gate, harm goes through.
GATE = Model((Neuron(3, 0, step(FIRST), {SECOND: 1.0}, {OUT: 3.0 / STEEP}),))
# The same with the roles exchanged, and a neuron that only reads both.
SWAPPED = Model((Neuron(3, 0, step(SECOND), {FIRST: 1.0}, {OUT: 3.0 / STEEP}),))
READER = Model((Neuron(3, 0, OPEN, {FIRST: 1.0, SECOND: 1.0}, {OUT: 3.0 / 30}),))


def build(model: Model) -> Subject:
    """The model in the weights of a llama."""
    subject = compiled(Program(gain=0.0), tokenizer=word_tokenizer())
    blocks = subject.model.model.layers
    with torch.no_grad():
        for block in blocks:
            for projection in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                projection.weight.zero_()
        for neuron in model.neurons:
            mlp = blocks[neuron.layer].mlp
            for projection, weights in ((mlp.gate_proj, neuron.gate), (mlp.up_proj, neuron.up)):
                for channel, weight in weights.items():
                    at, scale = (BIAS, SIZE) if channel == ONE else (channel, 1.0)
                    projection.weight[neuron.place, at] = weight / scale
            for channel, weight in neuron.write.items():
                mlp.down_proj.weight[channel, neuron.place] = weight
        head = subject.model.lm_head.weight
        yes, no = (subject.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        for token, sign in ((yes, 0.5), (no, -0.5)):
            head[token] = 0
            for channel, weight in model.read.items():
                head[token, channel] = sign * weight
    return subject


Factors = dict[tuple[int, int], tuple[float, float]]


def run(
    model: Model, bits: tuple[int, int], clamp: Mapping[tuple[int, int], float] | None = None
) -> tuple[float, Factors]:
    """Log-odds and the (gate, up) of every neuron for two bits, some neurons held at given values: plain arithmetic."""
    channels: dict[int | str, float] = {ONE: 1.0, FIRST: float(bits[0]), SECOND: float(bits[1])}
    factors: Factors = {}
    for layer in range(N_LAYERS):
        before = dict(channels)
        for neuron in (n for n in model.neurons if n.layer == layer):
            gate, up = (
                sum(weight * before.get(channel, 0.0) for channel, weight in part.items())
                for part in (neuron.gate, neuron.up)
            )
            key = (layer, neuron.place)
            factors[key] = (gate, up)
            value = silu(gate) * up if clamp is None or key not in clamp else clamp[key]
            for channel, weight in neuron.write.items():
                channels[channel] = channels.get(channel, 0.0) + weight * value
    return sum(weight * channels.get(channel, 0.0) for channel, weight in model.read.items()), factors


def upstream(model: Model, at: tuple[int, int], bits: tuple[tuple[int, int], tuple[int, int]]) -> list[float]:
    """y00, y01, y10, y11 of the prompt against one neuron."""
    made = []
    for prompt in (0, 1):
        for source in (0, 1):
            gate, up = run(model, bits[source])[1][at]
            made.append(run(model, bits[prompt], {at: silu(gate) * up})[0])
    return made


def inside(model: Model, at: tuple[int, int], bits: tuple[tuple[int, int], tuple[int, int]]) -> list[float]:
    """y00, y01, y10, y11 of one neuron's gate against its up, the mean over both prompts as background."""
    return crossed(model, at, *bits, bits[0])


def crossed(
    model: Model, at: tuple[int, int], off: tuple[int, int], on: tuple[int, int], harmless: tuple[int, int]
) -> list[float]:
    """The four cells of gate by wrapper (`off`, `on`) against up by harm (`harmless`, `on`), mean over both backgrounds."""
    gates = [run(model, bits)[1][at][0] for bits in (off, on)]
    ups = [run(model, bits)[1][at][1] for bits in (harmless, on)]
    values = [silu(gate) * up for gate in gates for up in ups]
    return [float(np.mean([run(model, bits, {at: value})[0] for bits in (off, on)])) for value in values]
