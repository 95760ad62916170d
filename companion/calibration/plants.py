"""Plants through the unchanged pipeline: where it says the effect passes and is written, beside where it was learned.

A plant is measured on a subset of the default prompt set; what needs generated answers (C5c, C6), the dearest part, is asked
of one seed of each kind. Its verdicts are no calibration, since nobody knows what is true of a trained model; they show what
the rules say when we know only where it was trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.base import paths, thresholds
from companion.base.device import to_host
from companion.base.thresholds import UNTRAINED
from companion.calibration import draws, localise
from companion.calibration.campaign import SCHEMAS, code_version, read_shipped, run_campaign
from companion.calibration.rates import ranking_quality
from companion.claims.ledger import CORRECTED
from companion.evidence.neurons import Neurons
from companion.mediation import study, summaries, sweeps
from companion.mediation.study import Study
from companion.model.load import from_model
from companion.prompts import invented
from organisms.behaviour import first_token_logprobs
from organisms.plants import KINDS, SEEDS, Plant, grow, learned_components
from organisms.prompt_set import suite_rows

TABLES = ("plants", "plant_scores", "plant_evidence")
PARTS = ("context", "layers", "neurons")
ANSWERED = SEEDS[0]  # plants of this seed are asked for answers, too
PROMPTS = "embedded"
PAIRS = 72  # a treatment: 21 topics in the test split, one more than the precondition asks for
SUITES = ("a_harmless", "b_plain_harm", "c_wrapped_harm")
TOP = 8  # neurons, as many as C5a allows to a small model
MEANING = {"total": "passes through (indirect effect)", "direct": "writes (direct effect)"}
Score = tuple[str, str, float]  # estimator, what, value


def plan_plants() -> list[Plant]:
    """All plants, seed by seed."""
    return [Plant(kind, seed) for seed in SEEDS for kind in KINDS]


def plant_study(plant: Plant, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """A plant with some pairs of the default prompt set."""
    this = study.begin("embedded", PROMPTS, plant.name)
    return replace(this, subject=from_model(model, tokenizer, plant.name)).subsample(PAIRS)


def measure_plant(plant: Plant) -> dict[str, pd.DataFrame]:
    """Grow a plant and measure it: its rows of all `TABLES`."""
    model, tokenizer = grow(plant)
    this = plant_study(plant, model, tokenizer)
    parts = tuple(draws.STAGES) if plant.seed == ANSWERED else PARTS
    measured = draws.measure_study(this, plant.name, parts, prompt_set=PROMPTS)
    assert measured.layers is not None and measured.neurons is not None
    shares = pd.concat([component_shares(plant, measured.layers.effects, "T2-T2b"), recognition_shares(plant, this)])
    scores = [*refusal_by_suite(model, tokenizer), *rank_learned_neurons(plant, measured.neurons, this)]
    made = {"plants": shares, "plant_scores": pd.DataFrame(scores, columns=["estimator", "what", "value"])}
    label = {"kind": plant.kind, "seed": plant.seed, "code": code_version()}
    found = {name: table.assign(**label)[list(SCHEMAS[name])] for name, table in made.items()}
    return found | {"plant_evidence": measured.rows}


def run_plants(share: str = "1/1", folder: Path = paths.CALIBRATION) -> None:
    """Grow and measure every plant of this share that is not there yet, and join what there is."""
    known = {(row.kind, row.seed) for row in read_shipped("plants", folder, or_empty=True).itertuples()}
    plan = {plant.name: plant for plant in plan_plants()}
    run_campaign(plan, measure_plant, TABLES, lambda one: (one.kind, one.seed) in known, share, folder)


def recognition_shares(plant: Plant, this: Study) -> pd.DataFrame:
    """`component_shares` of harmless against harmful requests (T1)."""
    harmful = replace(this, pairs=tuple(this.of("T1")), twins={})
    return component_shares(plant, sweeps.run_sweep(harmful, "layers with direct effects")["effects"], "T1")


def component_shares(plant: Plant, effects: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Total and direct effect of each component at the last token on test, as shares of the mean total effect.

    Columns treatment, effect, site, layer, `learned` (whether the component holds parameters that could move), share.
    The direct effects are those of the frozen-norm linear contrast, whose shares add up to one.
    """
    tables = []
    for name in MEANING:
        sites = [site + (".direct" if name == "direct" else "") for site in thresholds.COMPONENTS]
        table = summaries.signed(summaries.select(effects, treatment, localise.VARIANTS[name], sites))
        cells = table[table.split == "test"].groupby(["site", "layer"])[["nie", "te"]].mean()
        shares = (cells.nie / cells.te).rename("share").reset_index()
        shares["site"] = shares.site.str.removesuffix(".direct")
        tables.append(shares.assign(treatment=treatment, effect=name))
    table, learned = pd.concat(tables, ignore_index=True), learned_components(plant)
    return table.assign(learned=[(row.site, row.layer) in learned for row in table.itertuples()])


def refusal_by_suite(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Score]:
    """Mean P(refuse) of the first answer token by suite: whether the plant learned to refuse, and when not to."""
    table = pd.DataFrame([row for row in suite_rows() if row["suite"] in SUITES])
    refuse = tokenizer.convert_tokens_to_ids(invented.REFUSAL_OPENER)
    logp = first_token_logprobs(model, tokenizer, table["prompt"].tolist())
    means = table.assign(p=to_host(logp[:, refuse].exp())).groupby("suite").p.mean()
    return [("behaviour", str(suite), float(value)) for suite, value in means.items()]


def rank_learned_neurons(plant: Plant, found: Neurons, this: Study) -> list[Score]:
    """How well estimates rank the neurons that could move above the last layer's others; and the share of the top 8."""
    d_mlp = this.subject.d_mlp
    member = np.isin(np.arange(d_mlp), plant.neurons(d_mlp))
    rows: list[Score] = []
    for name, score in localise.neuron_scores(found, this).items() if member.any() else ():
        last = score.reshape(-1, d_mlp)[-1]
        top = np.argsort(-last, kind="stable")[:TOP]
        rows += [(name, what, value) for what, value in ranking_quality(member.tolist(), last.tolist()).items()]
        rows.append((name, f"learned among the top {TOP}", float(member[top].mean())))
    return rows


def shares_by_kind(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """For the figure: mean share and range over seeds, a row a kind (in the plan's order), effect and component ("attn 4")."""
    part = _with_component(table[table.treatment == treatment])
    keys = ["kind", "effect", "site", "layer", "component", "learned"]
    mean = part.groupby(keys, sort=False).share.agg(estimate="mean", low="min", high="max").reset_index()
    mean = mean.assign(place=mean.kind.map(KINDS.index), first=mean.effect != "total")
    mean = mean.sort_values(["first", "place", "site", "layer"]).assign(effect=mean.effect.map(MEANING))
    return mean[["kind", "effect", "component", "learned", "estimate", "low", "high"]]


def largest_shares(table: pd.DataFrame) -> pd.DataFrame:
    """For each plant, treatment and effect: the component with the largest share, and whether the plant learned there."""
    top = table.groupby(["kind", "seed", "treatment", "effect"]).share.idxmax()
    return _with_component(table.loc[top])


def _with_component(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(component=table.site.str.removesuffix("_out") + " " + table.layer.astype(str))


def tally_verdicts(evidence: pd.DataFrame) -> pd.DataFrame:
    """Verdicts of the registered rules and of the corrected C1, a row a kind: seeds "supported / contradicted / neither"."""
    said: dict[tuple[str, str], list[str]] = {}
    owner = evidence.model.str.removesuffix(UNTRAINED)
    for plant in plan_plants():
        own = evidence[owner == plant.name]
        for rule, one in draws.judged(own, plant.name):
            if one.claim in set(own.claim) and (rule == "registered" or one.claim == "C1"):
                name = one.claim + (CORRECTED if rule == "corrected" else "")
                said.setdefault((plant.kind, name), []).append(one.verdict)
    counts = {key: (v.count("supported"), v.count("contradicted"), len(v)) for key, v in said.items()}
    text = {key: f"{yes} / {no} / {n - yes - no}" for key, (yes, no, n) in counts.items()}
    return pd.Series(text).unstack().loc[[kind for kind in KINDS if (kind, "C1") in text]]
