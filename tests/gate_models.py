"""Hand-made models of gates and contributors, with an interpreter in plain Python that knows all their effects.

As in `models`, signals live in channels of their own and a large constant channel keeps every norm's scale nearly fixed.
Cue A puts a bit into FIRST and cue B one into SECOND, at the last token. A `Neuron` is act(gate) * up with a SiLU, its gate
and up linear in the channels, and writes into channels; the log-odds are linear in the channels (`read`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from models import BIAS, FIRST, N_LAYERS, OUT, SECOND, SIZE, Program, compiled, word_tokenizer

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


def ramp(layer: int, place: int, source: Mapping[int, float], target: int, at: float) -> list[Neuron]:
    """Two neurons that write min(max(sum - at, 0), 1) of the source channels, up to the SiLU's roundness."""
    steep: dict[int | str, float] = {channel: STEEP * weight for channel, weight in source.items()}
    gates = [{**steep, ONE: -STEEP * (at + i)} for i in (0, 1)]
    return [Neuron(layer, place + i, gates[i], {ONE: 1.0}, {target: (1, -1)[i] / STEEP}) for i in (0, 1)]


ADDITIVE = Model((Neuron(3, 0, OPEN, {FIRST: 1.0}, {OUT: 3.0 / 30}),), {OUT: 1.0, FIRST: 2.0})
INSIDE = Model((Neuron(3, 0, step(FIRST), {ONE: 0.5, SECOND: 1.0}, {OUT: 3.0 / STEEP}),))
# MIDDLE = FIRST; then OUT = 4 * silu(MIDDLE) * SECOND: the neuron below decides whether SECOND gets through.
RELAY = Neuron(2, 0, OPEN, {FIRST: 1.0}, {MIDDLE: 1 / 30})
BELOW = Model((RELAY, Neuron(3, 1, step(MIDDLE), {SECOND: 1.0}, {OUT: 4.0 / STEEP})))
AND, OR = (Model((RELAY, *ramp(3, 1, {MIDDLE: 1, SECOND: 1}, OUT, at))) for at in (1.0, 0.0))
# Writes 1 into OUT itself and 1 into MIDDLE, of which a neuron above makes 3 more.
BOTH_WAYS = Neuron(2, 0, OPEN, {FIRST: 1.0}, {OUT: 1.0 / 30, MIDDLE: 1.0 / 30})
MIXED = Model((BOTH_WAYS, Neuron(3, 1, OPEN, {MIDDLE: 1.0}, {OUT: 3.0 / 30})))
# Cue A is the wrapper, cue B the harm: the wrapper opens the gate, harm goes through.
GATE = Model((Neuron(3, 0, step(FIRST), {SECOND: 1.0}, {OUT: 3.0 / STEEP}),))
# The same with the roles exchanged, and a neuron that only reads both.
SWAPPED = Model((Neuron(3, 0, step(SECOND), {FIRST: 1.0}, {OUT: 3.0 / STEEP}),))
READER = Model((Neuron(3, 0, OPEN, {FIRST: 1.0, SECOND: 1.0}, {OUT: 3.0 / 30}),))


def build(model: Model) -> Subject:
    """The model in the weights of a llama."""
    subject = compiled(Program(gain=0.0), tokenizer=word_tokenizer())
    head = subject.model.lm_head.weight
    with torch.no_grad():
        for block in subject.model.model.layers:
            for parameter in block.mlp.parameters():
                parameter.zero_()
        for neuron in model.neurons:
            mlp = subject.model.model.layers[neuron.layer].mlp
            for projection, weights in ((mlp.gate_proj, neuron.gate), (mlp.up_proj, neuron.up)):
                for channel, weight in weights.items():
                    at, scale = (BIAS, SIZE) if channel == ONE else (channel, 1.0)
                    projection.weight[neuron.place, at] = weight / scale
            for channel, weight in neuron.write.items():
                mlp.down_proj.weight[channel, neuron.place] = weight
        for (token,), sign in ((YES_NO.comply, 0.5), (YES_NO.refuse, -0.5)):
            head[token] = 0
            for channel, weight in model.read.items():
                head[token, channel] = sign * weight
    return subject


Place = Bits = tuple[int, int]
Factors = dict[Place, tuple[float, float]]


def run(model: Model, bits: Bits, clamp: Mapping[Place, float] | None = None) -> tuple[float, Factors]:
    """Log-odds and the (gate, up) of every neuron for two bits, some neurons held at given values: plain arithmetic."""
    channels: dict[int | str, float] = {ONE: 1.0, FIRST: float(bits[0]), SECOND: float(bits[1])}
    factors: Factors = {}
    for layer in range(N_LAYERS):
        before = dict(channels)
        for neuron in (n for n in model.neurons if n.layer == layer):
            key, parts = (layer, neuron.place), (neuron.gate, neuron.up)
            gate, up = (sum(weight * before.get(at, 0.0) for at, weight in part.items()) for part in parts)
            factors[key] = (gate, up)
            value = (clamp or {}).get(key, silu(gate) * up)
            for channel, weight in neuron.write.items():
                channels[channel] = channels.get(channel, 0.0) + weight * value
    return sum(weight * channels.get(channel, 0.0) for channel, weight in model.read.items()), factors


def upstream(model: Model, at: Place, bits: tuple[Bits, Bits]) -> list[float]:
    """y00, y01, y10, y11 of the prompt against one neuron."""
    factors = [run(model, source)[1][at] for source in bits]
    return [run(model, prompt, {at: silu(gate) * up})[0] for prompt in bits for gate, up in factors]


def crossed(model: Model, at: Place, off: Bits, on: Bits, harmless: Bits) -> list[float]:
    """The four cells of gate by wrapper (`off`, `on`) against up by harm (`harmless`, `on`), mean over both backgrounds."""
    gates = [run(model, bits)[1][at][0] for bits in (off, on)]
    ups = [run(model, bits)[1][at][1] for bits in (harmless, on)]
    values = [silu(gate) * up for gate in gates for up in ups]
    return [float(np.mean([run(model, bits, {at: value})[0] for bits in (off, on)])) for value in values]
