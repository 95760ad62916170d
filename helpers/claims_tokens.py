"""The rules of C4 (MLPs carry the signal on) and C5c (a switch of the whole answer)."""

from __future__ import annotations

from dataclasses import replace

from helpers import controls
from helpers.controls import Rows
from helpers.verdicts import Verdict, decide, gate, generation, interval, tags, verdict

CARRIED = "share of MLPs"
CARRIED_OWN = "share of MLPs from this layer on"  # the hand-over layer's own MLP among them
KEPT = "share kept by the first token"
CONTENT = "content judge"  # the variant whose labels do not rest on an answer's opener
SPECIFIC = 0.2  # benign answers changed, as a share of the effect on harmful ones


def c4(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: MLPs alone carry low >= 0.60 of the hand-over residual stream's effect; contradicted: high <= 0.40.

    `corrected`: the hand-over layer's own MLP is one of them (`claims_corrected`).
    """
    stop = gate(rows, "C4", generation(rows))
    if stop:
        return stop
    carried = CARRIED_OWN if corrected else CARRIED
    share, undefined = rows.find("C4", carried), rows.find("C4", "not defined")
    if share is None and undefined is None:
        return Verdict(
            rows.model, "C4", "not testable", "the paths above the hand-over were not measured: run notebook 05"
        )
    if share is None:
        assert undefined is not None
        return Verdict(rows.model, "C4", "inconclusive", f"{undefined.note}{_elsewhere(rows)}")
    checks = {
        "final norm frozen": controls.same_side(rows, "C4", carried, "norm frozen", 0.5),
        "unsaturated pairs": controls.same_side(rows, "C4", carried, "unsaturated", 0.5),
        "joint probability": controls.joint(rows, "T2"),
    }
    decision = decide(supported=share.ci_low >= 0.60, contradicted=share.ci_high <= 0.40)
    where = "from the hand-over layer's own on" if corrected else "above the hand-over layer"
    parts = [f"MLPs {where} carry {interval(share)} of the effect"]
    for name in () if corrected else ("attention", "skip"):
        other = rows.find("C4", f"share of {name}")
        parts += [] if other is None else [f"{name} {interval(other)}"]
    layer = rows.find("C4", "hand-over layer")
    parts += (
        []
        if layer is None
        else [f"hand-over after layer {layer.estimate:.0f} [{layer.ci_low:.0f}, {layer.ci_high:.0f}]"]
    )
    made = verdict(rows, share, decision, checks, "; ".join(parts))
    # The full response has no such path: above the answer's own tokens there is no base run to hold anything at.
    return replace(made, tags=tags(rows, False, made.verdict))


def _elsewhere(rows: Rows) -> str:
    """What MLPs carry of the effect from the other layers, for a reader: no verdict rests on it."""
    others = rows.variants("C4", CARRIED, "from layer ")
    return "".join(f"; {name} MLPs carry {interval(row)}" for name, row in others.items())


def c5c(rows: Rows, *, corrected: bool = False) -> Verdict:
    """Supported: the first token keeps low >= 0.8 of the effect on all tokens, and specific; contradicted: high <= 0.4.

    Specific: the share of benign answers that change has its upper limit at 20 % of the harm effect or below.
    `corrected`: answers must have been labelled by their content (`claims_corrected`).
    """
    stop = gate(rows, "C5c", generation(rows))
    if stop:
        return stop
    labels = CONTENT if corrected else "main"
    kept, undefined = rows.find("C5c", KEPT, labels), rows.find("C5c", "not defined", labels)
    if corrected and kept is None and undefined is None and rows.find("C5c", KEPT) is not None:
        reason = "answers were labelled by their opener, which the first token decides: supply a judge (--judge)"
        return Verdict(rows.model, "C5c", "not testable", reason)
    if kept is None:
        missing = "interventions during generation were not measured: run notebook 05"
        return (
            Verdict(rows.model, "C5c", "not testable", missing)
            if undefined is None
            else Verdict(rows.model, "C5c", "inconclusive", str(undefined.note))
        )
    effect, benign = rows.find("C5c", "effect of all tokens", labels), rows.find("C5c", "benign answers changed")
    measured = effect is not None and benign is not None
    specific = measured and benign.ci_high <= SPECIFIC * effect.estimate  # type: ignore[union-attr]
    checks = {
        "benign answers": "passed" if measured else "not run",
        "full response": controls.same_side(rows, "C5c", KEPT, "full response", 0.6, labels),
        "joint probability": controls.joint(rows, "T2"),
    }
    decision = decide(supported=kept.ci_low >= 0.8 and specific, contradicted=kept.ci_high <= 0.4)
    reason = f"the first token alone keeps {interval(kept)} of the effect on all tokens"
    reason += f" ({kept.note})" if kept.note else ""
    reason += f"; effect of all tokens {interval(effect)}" if effect is not None else ""
    reason += (
        f"; benign answers changed {interval(benign)}, {'' if specific else 'not '}specific"
        if benign is not None
        else ""
    )
    hard = rows.find("C5c", "harmless answers changed, refusing run's values")
    reason += f"; with a refusing run's values {interval(hard)} of harmless answers change" if hard is not None else ""
    made = verdict(rows, kept, decision, checks, reason)
    # Not a part of the rule: benign pairs whose two runs agree cannot show it.
    is_blunt = hard is not None and effect is not None and hard.ci_low > SPECIFIC * effect.estimate
    return replace(
        made, tags=(*tags(rows, False, made.verdict), *(("closes harmless answers too",) if is_blunt else ()))
    )
