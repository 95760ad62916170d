"""Rules of the claims about neurons: C5a (a sparse last layer) and C7 (related neurons are adjacent)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from helpers import controls
from helpers.controls import MIN_BENIGN, Rows
from helpers.verdicts import Verdict, decide, gate, generation, interval, tags, verdict

FEW = 8  # k90 may be 1 % of the layer or this, whichever is more
PSI_MIDDLE = 0.225  # half way between the two thresholds of psi1


def c5a(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: psi1 low >= 0.30, k90 <= max(1 % of the layer, 8), below the benign median. Contradicted: psi1 high <=
    0.15 or k90 >= 10 % of the layer.

    `corrected`: the comparison with a random order can spoil "supported" only (`claims_corrected`).
    """
    stop = gate(rows, "C5a", generation(rows))
    if stop:
        return stop
    psi, size = rows.find("C5a", "psi1"), rows.find("C5a", "neurons in the layer")
    if psi is None or size is None:
        reason = "single neurons were not measured: run notebook 04 (a mixture of experts has no such neurons)"
        return Verdict(rows.model, "C5a", "not testable", reason)
    k90, benign = rows.find("C5a", "k90"), _benign_k90(rows)
    few, many = max(0.01 * size.estimate, FEW), 0.1 * size.estimate
    is_sparse = k90 is not None and k90.estimate <= few and (not benign or k90.estimate < np.median(benign))
    checks = {
        "benign behaviours": "not run" if not benign else "passed" if len(benign) >= MIN_BENIGN else "failed",
        "final norm frozen": controls.same_side(rows, "C5a", "psi1", "norm frozen", PSI_MIDDLE),
        "sign in unsaturated pairs": controls.same_side(rows, "C5a", "psi1", "unsaturated", 0.0),
        "joint probability": controls.joint(rows, "T2"),
    }
    decided = decide(
        supported=psi.ci_low >= 0.30 and is_sparse,
        contradicted=psi.ci_high <= 0.15 or (k90 is not None and k90.estimate >= many),
    )
    # A layer without a k90 is not compared with any order.
    if k90 is not None and (decided == "supported" or not corrected):
        random = rows.find("C5a", "k90", "random order")
        is_better = random is not None and random.ci_low > k90.ci_high
        checks["random order"] = "not run" if random is None else "passed" if is_better else "failed"
    against = f"benign median {np.median(benign):g}" if benign else "no benign behaviour to compare with"
    reason = f"psi1 of the last MLP {interval(psi)}; " + (
        "k90 none: the mean of its two effects is against the treatment"
        if k90 is None
        else f"k90 {k90.estimate:.0f} [{k90.ci_low:.0f}, {k90.ci_high:.0f}] of {size.estimate:.0f} neurons "
        f"(sparse: at most {few:g}, distributed: at least {many:g}), {against}"
    )
    shown = psi if k90 is None or not psi.ci_low >= 0.30 else k90
    made = verdict(rows, shown, decided, checks, reason)
    return replace(made, tags=tags(rows, False, made.verdict))


def _benign_k90(rows: Rows) -> list[float]:
    table = rows.table
    found = table[(table.claim == "C5a") & table.quantity.str.fullmatch(r"k90 B\S*") & (table.variant == "main")]
    return [float(value) for value in found.estimate]


def c7(rows: Rows) -> Verdict:
    """Supported: Moran's I of rank |NIE| low >= 0.05. Contradicted: high <= 0.05."""
    stop = gate(rows, "C7", generation(rows))
    if stop:
        return stop
    moran = rows.find("C7", "Moran's I")
    if moran is None:
        reason = "single neurons were not measured: run notebook 04 (a mixture of experts has no such neurons)"
        return Verdict(rows.model, "C7", "not testable", reason)
    window, p = rows.find("C7", "best window - best random group"), rows.find("C7", "best window, permutation p")
    checks = {
        "best window against random groups": "not run" if p is None
        else "passed" if (p.estimate <= 0.05) == (moran.estimate > 0.05) else "failed",
        "joint probability": controls.joint(rows, "T2"),
    }  # fmt: skip
    reason = f"Moran's I {moran.estimate:.3f} [{moran.ci_low:.3f}, {moran.ci_high:.3f}] ({moran.note})"
    if window is not None and p is not None:
        reason += f"; best window - best random group {interval(window)} of TE, permutation p {p.estimate:.2f}"
    decided = decide(supported=moran.ci_low >= 0.05, contradicted=moran.ci_high <= 0.05)
    made = verdict(rows, moran, decided, checks, reason)
    return replace(made, tags=tags(rows, False, made.verdict))
