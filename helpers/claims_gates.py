"""Rule of C5b: the sparse set gates harmful generation, it does not just contribute to it.

Two choices were fixed, as all thresholds here, before the shipped models were measured (what the index may be read from was
widened after a first look: `gate_choice`).
A last-layer neuron only adds into the last residual stream, so the plain factorial (form a) is near zero there whatever
was learned, and the verdict reads the forms in which a gate could show: inside a neuron (b) and below the last layer (c).
And "not a readout" means that less than half of the set's effect is what it writes into the logits itself.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from helpers import controls
from helpers.controls import Rows
from helpers.gates import BENIGN_SHARE, GATE_HIGH, GATE_LOW, PERPLEXITY, READOUT
from helpers.verdicts import Verdict, decide, gate, generation, interval, tags, verdict

MIDDLE = 0.4  # half way between the two thresholds


def c5b(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: gate index low >= 0.6, specific, not a readout. Contradicted: index high <= 0.2 in every form, b and c, that is
    defined.

    "Every form" has the whole last layer in it, so that no smaller set of it was overlooked.

    Specific: benign share high <= 0.20 and perplexity ratio high <= 1.01. Not a readout: readout share high < 0.5.

    `corrected`: an index inside the last layer's sparse set counts if it is the larger one, and a set with such an index
    may be a readout (`claims_corrected`).
    """
    stop = gate(rows, "C5b", generation(rows))
    if stop:
        return stop
    index = rows.find("C5b", "gate index")
    if index is None:
        return _nothing(rows)
    inside = _inside(rows) if corrected else None
    if inside is not None and inside.ci_low >= index.ci_low:
        index = inside
    signed = rows.find("C5b", f"{index.quantity}, signed", index.variant)
    readout, benign, cost = (
        _of_set(rows, name, index) for name in ("readout share", "benign share", "perplexity ratio")
    )
    is_gate = index.ci_low >= GATE_LOW and signed is not None and signed.ci_low > 0
    is_specific = _below(benign, BENIGN_SHARE) and _below(cost, PERPLEXITY)
    not_readout = index is inside or (readout is not None and readout.ci_high < READOUT)
    checks = {
        "specificity measured": "not run" if benign is None or cost is None else "passed",
        "final norm frozen": _frozen(rows, index),
        "joint probability": controls.joint(rows, "T2"),
    }
    forms = [row for key in "bc" for row in _forms(rows, key)]
    decided = decide(
        supported=is_gate and is_specific and not_readout,
        contradicted=bool(forms) and all(row.ci_high <= GATE_HIGH for row in forms),
    )
    made = verdict(rows, index, decided, checks, _reason(rows, index, signed))
    return replace(made, tags=tags(rows, False, made.verdict))


def _inside(rows: Rows) -> pd.Series | None:
    """The form b of the last layer's sparse set with the highest lower limit."""
    found = [row for row in _forms(rows, "b") if not str(row.note).endswith(", whole last layer")]
    return max(found, key=lambda row: row.ci_low, default=None)


def _of_set(rows: Rows, quantity: str, index: pd.Series) -> pd.Series | None:
    """Another test of the set that an index was measured on: the verdict's own, or the last layer's sparse set."""
    found = rows.find("C5b", quantity)
    if index.quantity == "gate index" or (found is not None and str(found.note).endswith("; last")):
        return found
    return rows.find("C5b", quantity, "last layer")


def _frozen(rows: Rows, index: pd.Series) -> str:
    """The index with the final norm's scale frozen lies on the same side of the middle."""
    variant = "norm frozen" if index.variant == "main" else f"{index.variant}, norm frozen"
    return controls.same_side(rows, "C5b", str(index.quantity), variant, MIDDLE, str(index.variant))


def _nothing(rows: Rows) -> Verdict:
    if rows.variants("C5b", "gate index, form", "a"):
        reason = "no sparse set has at least 0.2 of TE at stake: there is nothing of which to ask whether it is a gate"
        row = next(iter(rows.variants("C5b", "gate index, form", "a").values()))
        return verdict(rows, row, "inconclusive", {}, reason)
    reason = "sets of neurons were not tested: run notebook 04 (a mixture of experts has no such neurons)"
    return Verdict(rows.model, "C5b", "not testable", reason)


def _forms(rows: Rows, form: str) -> list[pd.Series]:
    """Rows of a form on the harm contrast that are defined; benign references carry a treatment's name."""
    return [
        row
        for name, row in rows.variants("C5b", "gate index, form", f"{form}:").items()
        if not name.endswith(("frozen", "read-out"))
        and not str(row.note).startswith("not defined")
        and ", own B" not in str(row.note)
    ]


def _below(row: pd.Series | None, limit: float) -> bool:
    return row is not None and row.ci_high <= limit


def _reason(rows: Rows, index: pd.Series, signed: pd.Series | None) -> str:
    parts = [f"gate index {interval(index)} ({index.note})"]
    if signed is not None and signed.ci_high < 0:
        parts.append("its sign is that of an OR: one of several would do")
    for quantity in ("readout share", "benign share", "perplexity ratio", "timing share"):
        row = _of_set(rows, quantity, index)
        parts.append(f"{quantity} {interval(row)}" if row is not None else f"{quantity} not measured")
    return "; ".join(parts)
