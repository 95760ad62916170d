"""Tables of the section "gate or contributor": what the tests gave, what each can show, and a drawing of where a gate can be."""

from __future__ import annotations

import pandas as pd

from helpers.gates import BENIGN_SHARE, GATE_LOW, LEAST, PERPLEXITY, READOUT

# Quantity in the evidence, its test, what counts as passed, what it can show, what it cannot.
TESTS = (
    ("gate index", "i factorial", f"low >= {GATE_LOW}, sign of an AND", "that signal and set act only together",
     "which of the two is the gate, nor a gate for a signal that the pairs do not switch"),
    ("benign share", "ii specificity", f"high <= {BENIGN_SHARE:.2f}", "that the set does little in benign decisions",
     "that it does nothing else: only these behaviours were tried"),
    ("perplexity ratio", "ii specificity", f"high <= {PERPLEXITY}", "that closing it spares benign answers",
     "how it acts on other text; closed values come from other prompts"),
    ("timing share", "iii timing", "reported", "whether acting once, at the first answer token, is enough",
     "a switch that the model was not free to lack: here the opener decides the answer"),
    ("readout share", "iv readout", f"high < {READOUT}", "how much of the effect the set writes into the logits itself",
     "anything about the last layer, where it is near 1 whatever was learned"),
)  # fmt: skip
SETS = {"main": "set of the verdict", "last layer": "sparse set of the last layer"}


def tests(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a test and set: number, interval, whether it passes, what it can and cannot show. From rows of C5b."""
    made = []
    for quantity, test, rule, can, cannot in TESTS:
        found = rows[(rows.quantity == quantity) & rows.variant.isin(list(SETS))]
        for one in found.itertuples():
            signed = rows[(rows.quantity == f"{quantity}, signed") & (rows.variant == one.variant)]
            state = _state(quantity, one, signed)
            numbers = (one.estimate, one.ci_low, one.ci_high)
            made.append((f"{test}: {quantity}", SETS[str(one.variant)], *numbers, rule, state, can, cannot, one.note))
    names = ["test", "set", "estimate", "low", "high", "rule", "state", "can show", "cannot show", "note"]
    return pd.DataFrame(made, columns=names)


def _state(quantity: str, one: object, signed: pd.DataFrame) -> str:
    low, high = one.ci_low, one.ci_high  # type: ignore[attr-defined]
    holds = {
        "gate index": low >= GATE_LOW and len(signed) > 0 and bool((signed.ci_low > 0).all()),
        "benign share": high <= BENIGN_SHARE,
        "perplexity ratio": high <= PERPLEXITY,
        "readout share": high < READOUT,
    }
    return "reported" if quantity not in holds else "passes" if holds[quantity] else "does not pass"


def forms(rows: pd.DataFrame) -> pd.DataFrame:
    """The signed index of every form that is defined, by what the outcome is: log-odds, norm frozen, linear read-out."""
    found = rows[(rows.quantity == "gate index, form, signed") & ~rows.note.str.startswith("not defined")]
    outcome = found.variant.str.extract(", (norm frozen|linear read-out)$")[0].fillna("log-odds")
    variant = found.variant.str.replace(", (norm frozen|linear read-out)$", "", regex=True)
    table = found.assign(form=variant, outcome=outcome, low=found.ci_low, high=found.ci_high)
    table = table[["form", "outcome", "estimate", "low", "high", "note"]]
    return table.sort_values("form", kind="stable", key=_benign_last).reset_index(drop=True)


def _benign_last(forms: pd.Series) -> pd.Series:
    return forms.str.contains(r" B\d+$").map({False: "0 ", True: "1 "}) + forms


def undefined(rows: pd.DataFrame) -> list[str]:
    """Forms of which too little is at stake on discover (less than 0.2 of TE), or whose set takes no part."""
    found = rows[(rows.quantity == "gate index, form") & rows.note.str.startswith("not defined")]
    plain = found[~found.variant.str.contains("frozen|read-out")]
    return [f"{name} (less than {LEAST} of TE)" for name in plain.variant]


def drawing() -> pd.DataFrame:
    """Where a network can multiply: boxes and arrows of two panels; columns: panel, kind, x, y, to_x, to_y, text, colour."""
    last, inside = "Between last-layer neurons: only +", "Inside one neuron: gate x up"
    boxes = [
        (last, 0.0, 1.0, "everything\nupstream", "grey"), (last, 0.0, 0.0, "the set\na_j w_j", "orange"),
        (last, 1.6, 0.5, "+", "blue"), (last, 2.6, 0.5, "norm", "grey"), (last, 3.6, 0.5, "logits", "grey"),
        (inside, 0.0, 1.0, "gate\nprojection", "orange"), (inside, 0.0, 0.0, "up\nprojection", "grey"),
        (inside, 1.6, 0.5, "x", "blue"), (inside, 2.6, 0.5, "w_j", "grey"), (inside, 3.6, 0.5, "+", "grey"),
    ]  # fmt: skip
    made = [(panel, "box", x, y, x, y, text, colour) for panel, x, y, text, colour in boxes]
    for panel in (last, inside):
        for x, y, to_x, to_y in ((0, 1, 1.6, 0.5), (0, 0, 1.6, 0.5), (1.6, 0.5, 2.6, 0.5), (2.6, 0.5, 3.6, 0.5)):
            made.append((panel, "arrow", float(x), float(y), to_x, to_y, "", "grey"))
    return pd.DataFrame(made, columns=["panel", "kind", "x", "y", "to_x", "to_y", "text", "colour"])
