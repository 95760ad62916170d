"""What the sweeps of notebooks 02 and 03 cost on a model of any size: operations counted, one factor measured.

    python -m benchmarks.cost_model      # the table of docs/scaling.md

Operations are multiply-adds times two of dense products; attention scores are left out (prompts are short). The factor
between arithmetic and wall time is that of results/benchmarks/sweeps.csv, measured on one CPU core; a GPU's rate is an
assumption of whoever asks, not a measurement.
"""

from dataclasses import dataclass

from benchmarks.shapes import LLAMA_8B, SITES, Shape

LLAMA_70B = Shape(80, 8192, 28_672, 64, 8, 128_256, 128, 64)
OVERHEAD = 1.6  # wall time over arithmetic: 1.29 to 2.15 for whole sweeps, 1.14 to 1.75 for interventions alone


@dataclass(frozen=True)
class Design:
    """How many pairs of each kind, and the tokens of an answer that Y2 scores."""

    recognition: int = 400
    generation: int = 800  # T2 and T2b
    benign: int = 2000
    twin_share: float = 0.3  # the untrained twin is measured on at most 120 pairs a treatment, here of 400
    answer_tokens: int = 16

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.recognition + self.generation + self.benign


@dataclass(frozen=True)
class Machine:
    """Processors that share the batches, and the operations a second that one of them sustains."""

    name: str
    processors: int
    rate: float


def token_operations(shape: Shape) -> float:
    """One token through one layer."""
    keys = shape.d_model // shape.n_heads * shape.n_key_heads
    return 2.0 * shape.d_model * (2 * shape.d_model + 2 * keys + 3 * shape.d_mlp)


def last_token(shape: Shape, sites: int = len(SITES), feeding: int = 1, read_rows: int = 2) -> float:
    """Every layer's interventions at the last token, one pair, one direction: layers above, own MLPs, what is read.

    `feeding` of the `sites` feed their own layer's MLP: of the three of a layer one (attention), of heads all.
    """
    layers = shape.n_layers
    above = layers * (layers - 1) / 2 * token_operations(shape)
    own = layers * 2.0 * 3 * shape.d_model * shape.d_mlp
    return sites * (above + layers * 2.0 * shape.d_model * read_rows) + feeding * own


def sweeps(shape: Shape, design: Design) -> dict[str, float]:
    """Operations of each sweep on all pairs, both directions, with the clean runs that it makes."""
    clean = 2 * shape.n_pos * shape.n_layers * token_operations(shape)
    shared = shape.n_layers * (shape.n_layers - 1) / 2 * token_operations(shape) * shape.n_pos
    plain, heads = last_token(shape), last_token(shape, sites=shape.n_heads, feeding=shape.n_heads)
    n = design.answer_tokens
    answers = 2 * 2 * n * last_token(shape, read_rows=shape.vocabulary)  # answer and refusal, both directions
    layers = design.pairs * (clean + 2 * plain) + design.recognition * 2 * shared
    return {
        "layers": layers,
        "untrained twin": design.twin_share * layers,
        "whole answers": design.generation * (answers + 3 * clean),
        "modules and heads": design.pairs * (clean + 2 * heads),
    }


def hours(shape: Shape, design: Design, machine: Machine) -> float:
    """Wall time of all sweeps, the batches shared evenly."""
    return OVERHEAD * sum(sweeps(shape, design).values()) / machine.rate / machine.processors / 3600


def parameters(shape: Shape) -> float:
    """Weights of the model."""
    layer = token_operations(shape) / 2
    return shape.n_layers * layer + 2 * shape.d_model * shape.vocabulary


def gigabytes(shape: Shape, bytes_a_number: int = 4, copies: int = 2) -> float:
    """Memory of one process: the model and its untrained twin (bfloat16: and a float32 copy), and 3 GiB of clean runs."""
    return parameters(shape) * bytes_a_number * copies / 1e9 + 3.2


MACHINES = (
    Machine("one GPU", 1, 10e12),
    Machine("eight GPUs", 8, 10e12),
    Machine("a cluster of 64 GPUs", 64, 10e12),
)


def _rounded(time: float) -> str:
    return f"{time:.0f}" if time >= 10 else f"{time:.1g}" if time < 1 else f"{time:.1f}"


def table() -> list[str]:
    """The table of docs/scaling.md, and below it what each sweep takes of the whole."""
    design, rows, below = Design(), [], []
    head = "| model | weights, float32 | memory a process | " + " | ".join(machine.name for machine in MACHINES) + " |"
    for name, shape in (("8B", LLAMA_8B), ("70B", LLAMA_70B)):
        times = [f"{_rounded(hours(shape, design, machine))} h" for machine in MACHINES]
        memory = f"{parameters(shape) * 4 / 1e9:.0f} GB | {gigabytes(shape):.0f} GB"
        rows.append(f"| {name} | {memory} | " + " | ".join(times) + " |")
        total = sum(sweeps(shape, design).values())
        shares = ", ".join(f"{sweep} {value / total:.0%}" for sweep, value in sweeps(shape, design).items())
        below.append(f"{name}: {total:.2g} operations; {shares}")
    return [head, "| --- " * (3 + len(MACHINES)) + "|", *rows, "", *below]


if __name__ == "__main__":
    print(*table(), sep="\n")
