"""The arms of the comparison: published methods, the late-layer variants, and the controls, all from one fit.

Which arm carries the verdict on C6 was fixed before any result: `DECISIVE`, an adaptive method in the style of AdaSteer
whose vectors are added at late layers only. AdaSteer as published adds them at every layer, so this is a method of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import pandas as pd

from helpers import (
    defence_tradeoff,
    neuron_effects,
    steering_adaptive,
    steering_fit,
    steering_methods,
    steering_targeted,
)
from helpers.defence import Lab
from helpers.defence_tradeoff import Bench
from helpers.depth import EARLY, LATE, depth
from helpers.errors import InputError
from helpers.steering import Edit, Steering
from helpers.steering_fit import Fit
from helpers.study import Study

DECISIVE: Final = "AdaSteer-style, late layers"
N_NEURONS: Final = 32
ZONES: Final = ("early", "mid", "late")


def zones(n_layers: int) -> dict[str, list[int]]:
    """Layers by relative depth: early < 1/3, late > 2/3, the others mid.

    >>> zones(6)
    {'early': [0, 1], 'mid': [2, 3], 'late': [4, 5]}
    """
    at = depth(np.arange(n_layers), n_layers)
    masks = {"early": at < EARLY, "mid": (at >= EARLY) & (at <= LATE), "late": at > LATE}
    return {name: [int(layer) for layer in np.flatnonzero(mask)] for name, mask in masks.items()}


def top_neurons(study: Study, k: int = N_NEURONS) -> dict[int, list[int]]:
    """The last-layer neurons with the largest mean indirect effect in the direction of TE, on the discover pairs of T2."""
    last = study.subject.n_layers - 1
    discover = tuple(p for p in study.of("T2") if p.pair.split == "discover")
    columns = neuron_effects.all_neurons(study.subject, [last])
    effects, _ = neuron_effects.measure(replace(study, pairs=discover), "T2", columns)
    toward = effects.nie.mean(0) * np.sign(effects.pairs.te.mean())
    return {last: sorted(int(i) for i in np.argsort(-toward, kind="stable")[:k])}


def builders(n_layers: int, neurons: Mapping[int, Sequence[int]] | None) -> dict[str, Callable[[Fit], Steering]]:
    """Every arm by its name, as a function of a fit."""
    late = zones(n_layers)["late"]
    made: dict[str, Callable[[Fit], Steering]] = {
        "prompting": steering_methods.prompting,
        "fixed rejection, all layers": steering_methods.fixed,
        "fixed rejection, late layers": partial(steering_methods.fixed, layers=late),
        "ablation of harmfulness": steering_methods.ablation,
        "CAST (threshold gate)": steering_methods.cast,
        "AlphaSteer (null space)": steering_methods.alphasteer,
        "AdaSteer, as published": steering_adaptive.adasteer,
        "AdaSteer, as released": steering_adaptive.adasteer_released,
        DECISIVE: partial(steering_adaptive.adasteer, layers=late),
        "targeted, late MLPs": partial(steering_targeted.layer_form, layers=late),
    }
    if neurons:
        made["targeted, last-layer neurons"] = partial(steering_targeted.neuron_form, neurons=neurons)
    return made


def arms(
    fit: Fit, made: Mapping[str, Callable[[Fit], Steering]], only: Sequence[str] = ()
) -> tuple[dict[str, Steering], dict[str, str]]:
    """The arms that this fit defines, and for each of the others the sentence that says why not."""
    defined: dict[str, Steering] = {}
    refused: dict[str, str] = {}
    for name in only or made:
        try:
            defined[name] = replace(made[name](fit), name=name)
        except InputError as error:
            refused[name] = str(error)
    return defined, refused


def tuned(
    lab: Lab, steered: Mapping[str, Steering], on: Bench, strengths: Sequence[float] = defence_tradeoff.STRENGTHS
) -> tuple[dict[str, Steering], pd.DataFrame]:
    """Every arm at the strength chosen on the validate bench, and the curves that it was chosen from."""
    made = [defence_tradeoff.curve(lab, one, on, _steps(one, strengths)) for one in steered.values()]
    empty = pd.DataFrame(columns=list(defence_tradeoff.COLUMNS))
    curves = pd.concat(made, ignore_index=True) if made else empty
    chosen = {
        name: defence_tradeoff.scaled(one, defence_tradeoff.choose(curves[curves.method == name]))
        for name, one in steered.items()
    }
    return chosen, curves


def _steps(steered: Steering, strengths: Sequence[float]) -> Sequence[float]:
    """A sentence in the system turn is there or not: it has one strength."""
    return strengths if steered.edits else (1.0,)


def transplanted(fit: Fit, strength: float = 1.0, *, layers: Sequence[int]) -> Steering:
    """The last layer's rejection vector added to the residual stream at other layers, at all prompt tokens."""
    vector = steering_fit.rejection(fit)[-1]
    edits = tuple(
        Edit(layer, "resid_post", steering_methods.constant(vector), "prompt", blind=True) for layer in layers
    )
    return Steering("transplanted", edits, strength)


def rivals(lab: Lab, fit: Fit, target: float, on: Bench) -> dict[str, Steering]:
    """The best early and the best middle steering with the same budget, chosen on the validate bench.

    Candidates are the decisive method fitted at those layers, a fixed rejection vector there, and the late layers' vector
    injected there: a rival must not lose because it was handed a poor direction.
    """
    found = {}
    groups = zones(lab.subject.n_layers)
    for zone in ("early", "mid"):
        made = {
            f"AdaSteer-style, {zone} layers": partial(steering_adaptive.adasteer, layers=groups[zone]),
            f"fixed rejection, {zone} layers": partial(steering_methods.fixed, layers=groups[zone]),
            f"late vector at {zone} layers": partial(transplanted, layers=groups[zone]),
        }
        candidates = []
        for one in arms(fit, made)[0].values():
            with suppress(InputError):  # it adds nothing at any strength: no rival
                candidates.append(defence_tradeoff.at_budget(lab, one, target, on))
        if candidates:
            left = [defence_tradeoff.harms(lab, [one], on)[0] for one in candidates]
            found[zone] = min(zip(left, candidates, strict=True), key=lambda item: (item[0], item[1].name))[1]
    return found
