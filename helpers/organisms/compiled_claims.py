"""What is true of a compiled model by construction, claim by claim.

Truth is about what was built, not about what an estimator would say of it: an estimator that disagrees has erred.

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
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helpers.depth import LATE, depth
from helpers.neuron_curves import settles
from helpers.organisms import compiled_truth
from helpers.organisms.compiled_design import Design
from helpers.organisms.compiled_language import Planned
from helpers.organisms.compiled_program import Program


def claims(design: Design, program: Program, pairs: Sequence[Planned]) -> dict[str, bool | None]:
    """Each claim's truth: True, False, or None where the construction does not decide it."""
    late = bool(depth(design.write_layer, design.n_layers) > LATE)
    decided = min([stage.layer for stage in design.stages if stage.op != "relay"], default=design.write_layer)
    is_mlp = design.writer == "mlp"
    specific = design.benign_decide < decided
    at_end = is_mlp and design.write_layer == design.n_layers - 1
    multiplies = at_end and design.stages[-1].op in ("product", "either")
    return {
        "C1": bool(late and depth(decided, design.n_layers) > LATE and specific),
        "C2": is_mlp,
        "C3": design.recognised_early,
        "C4": is_mlp,
        "C5a": _sparse(design, program, pairs) if at_end else False,
        "C5b": None if at_end and design.stages[-1].op == "threshold" else multiplies,
        "C5c": not design.each_token if at_end else None,
        "C6": None if late and not is_mlp else late,
        "C7": design.contiguous,
    }


def _sparse(design: Design, program: Program, pairs: Sequence[Planned]) -> bool | None:
    """C5a from the closed form: psi of the last-layer MLP (what its neurons write into the outcome), and its k90."""
    share, k90 = last_layer(program, pairs)
    if share <= 0.15 or k90 >= 0.1 * design.d_mlp:
        return False
    return True if share >= 0.30 and k90 <= 8 else None


def last_layer(program: Program, pairs: Sequence[Planned]) -> tuple[float, int]:
    """Proportion of T2 - T2b's TE that last-layer neurons write, and their k90, as the pipeline defines it: ranked by size, since
    some may undo what others write, and past 0.9 for good (`settles`).

    Over all pairs of the prompt set, ranked on the same pairs.
    """
    of = {name: [planned for planned in pairs if planned.pair.treatment == name] for name in ("T2", "T2b")}
    neurons = [compiled_truth.last_layer_neurons(program, chosen).mean(axis=0) for chosen in of.values()]
    totals = [compiled_truth.total(program, chosen).mean() for chosen in of.values()]
    effect, te = neurons[0] - neurons[1], totals[0] - totals[1]
    joint = np.cumsum(effect[np.argsort(-abs(effect))]) / effect.sum()
    k90 = settles(joint, np.arange(1, len(joint) + 1), 0.9)
    return float(effect.sum() / te), int(len(joint) if np.isnan(k90) else k90)
