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


def c5b(rows: Rows) -> Verdict:
    """Supported: gate index low >= 0.6, specific, not a readout. Contradicted: index high <= 0.2 in every form, b and c, that is
    defined.

    "Every form" has the whole last layer in it, so that no smaller set of it was overlooked.

    Specific: benign share high <= 0.20 and perplexity ratio high <= 1.01. Not a readout: readout share high < 0.5.
    """
    stop = gate(rows, "C5b", generation(rows))
    if stop:
        return stop
    index = rows.find("C5b", "gate index")
    if index is None:
        return _nothing(rows)
    signed, readout = rows.find("C5b", "gate index, signed"), rows.find("C5b", "readout share")
    benign, cost = rows.find("C5b", "benign share"), rows.find("C5b", "perplexity ratio")
    forms = [
        row for key in "bc" for name, row in _forms(rows, key).items() if not name.endswith(("frozen", "read-out"))
    ]
    is_gate = index.ci_low >= GATE_LOW and signed is not None and signed.ci_low > 0
    is_specific = _below(benign, BENIGN_SHARE) and _below(cost, PERPLEXITY)
    not_readout = readout is not None and readout.ci_high < READOUT
    checks = {
        "specificity measured": "not run" if benign is None or cost is None else "passed",
        "final norm frozen": controls.same_side(rows, "C5b", "gate index", "norm frozen", MIDDLE),
        "joint probability": controls.joint(rows, "T2"),
    }
    decided = decide(
        supported=is_gate and is_specific and not_readout,
        contradicted=bool(forms) and all(row.ci_high <= GATE_HIGH for row in forms),
    )
    made = verdict(rows, index, decided, checks, _reason(rows, index))
    return replace(made, tags=tags(rows, False, made.verdict))


def _nothing(rows: Rows) -> Verdict:
    if rows.variants("C5b", "gate index, form", "a"):
        reason = "no sparse set has at least 0.2 of TE at stake: there is nothing of which to ask whether it is a gate"
        row = next(iter(rows.variants("C5b", "gate index, form", "a").values()))
        return verdict(rows, row, "inconclusive", {}, reason)
    reason = "sets of neurons were not tested: run notebook 04 (a mixture of experts has no such neurons)"
    return Verdict(rows.model, "C5b", "not testable", reason)


def _forms(rows: Rows, form: str) -> dict[str, pd.Series]:
    """Rows of a form on the harm contrast that are defined, by variant; benign references carry a treatment's name."""
    found = rows.variants("C5b", "gate index, form", f"{form}:")
    return {
        name: row
        for name, row in found.items()
        if not str(row.note).startswith("not defined") and ", own B" not in str(row.note)
    }


def _below(row: pd.Series | None, limit: float) -> bool:
    return row is not None and row.ci_high <= limit


def _reason(rows: Rows, index: pd.Series) -> str:
    parts = [f"gate index {interval(index)} ({index.note})"]
    signed = rows.find("C5b", "gate index, signed")
    if signed is not None and signed.ci_high < 0:
        parts.append("its sign is that of an OR: one of several would do")
    for quantity in ("readout share", "benign share", "perplexity ratio", "timing share"):
        row = rows.find("C5b", quantity)
        parts.append(f"{quantity} {interval(row)}" if row is not None else f"{quantity} not measured")
    return "; ".join(parts)
