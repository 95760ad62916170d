"""Plants through the unchanged pipeline: where it says the effect passes and is written, beside where it was learned.

A plant is measured on a subset of the default prompt set; what needs generated answers (C5c, C6), the dearest part, is asked
of one seed of each kind. Its verdicts are no calibration, since nobody knows what is true of a trained model; they show what
the rules say when we know only where it was trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.base import files, paths, thresholds
from companion.base.thresholds import UNTRAINED
from companion.calibration import campaign, localise, one_draw
from companion.calibration.rates import ranking_quality
from companion.claims.ledger import CORRECTED
from companion.evidence import pipeline
from companion.evidence.neurons import Neurons
from companion.mediation import study, summaries, sweeps
from companion.mediation.study import Study
from companion.mediation.summaries import Variant
from companion.model.load import from_model
from companion.prompts import invented
from organisms import plants
from organisms.behaviour import first_token_logprobs
from organisms.language import suite_rows
from organisms.plants import KINDS, SEEDS, Plant

PARTS = ("context", "layers", "neurons")


ANSWERED = SEEDS[:1]  # plants of these seeds are asked for answers, too


PROMPTS = "embedded"


PAIRS = 72  # a treatment: 21 topics in the test split, one more than the gate asks for


SUITES = ("a_harmless", "b_plain_harm", "c_wrapped_harm")


EFFECTS = {"total": Variant("main"), "direct": Variant("", outcome="contrast.frozen")}


TOP = 8  # neurons, as many as C5a allows to a small model


SCHEMAS = {
    "plants": {
        **dict.fromkeys(("kind", "treatment", "effect", "site", "code"), "str"),
        **dict.fromkeys(("seed", "layer"), "int"),
        "learned": "bool",
        "share": "float",
    },
    "plant_scores": localise.SCHEMA,
    "plant_evidence": files.EVIDENCE,
}


def plan_plants() -> list[Plant]:
    """All plants, seed by seed."""
    return [Plant(kind, seed) for seed in SEEDS for kind in KINDS]


def study_of(plant: Plant, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """A plant with some pairs of the default prompt set."""
    this = study.begin("embedded", PROMPTS, plant.name)
    return replace(this, subject=from_model(model, tokenizer, plant.name)).subsample(PAIRS)


def measure_plant(plant: Plant) -> dict[str, pd.DataFrame]:
    """Grow a plant and measure it: its rows of all tables (`SCHEMAS`)."""
    model, tokenizer = plants.grow(plant)
    this = study_of(plant, model, tokenizer)
    parts = tuple(pipeline.STAGES) if plant.seed in ANSWERED else PARTS
    measured = pipeline.measure_study(this, plant.name, parts, prompt_set=PROMPTS)
    assert measured.layers is not None and measured.neurons is not None
    found = pd.concat([components(plant, measured.layers.effects, "T2-T2b"), recognition(plant, this)])
    scores = [*behaviour(model, tokenizer), *planted_neurons(plant, measured.neurons, this)]
    return {
        "plants": found.assign(kind=plant.kind, seed=plant.seed, code=one_draw.code(__file__))[list(SCHEMAS["plants"])],
        "plant_scores": pd.DataFrame(scores, columns=["estimator", "what", "value"]).assign(
            kind=plant.kind, seed=plant.seed
        )[list(localise.SCHEMA)],
        "plant_evidence": measured.rows,
    }


def recognition(plant: Plant, this: Study) -> pd.DataFrame:
    """`components` of harmless against harmful requests (T1)."""
    harmful = replace(this, pairs=tuple(this.of("T1")), twins={})
    return components(plant, sweeps.run_sweep(harmful, "layers with direct effects")["effects"], "T1")


def components(plant: Plant, effects: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Total and direct effect of each component at the last token on test, as shares of the mean total effect.

    Columns treatment, effect, site, layer, `learned` (whether the component holds parameters that could move), share.
    The direct effects are those of the frozen-norm linear contrast, whose shares add up to one.
    """
    tables = []
    for name, variant in EFFECTS.items():
        sites = [site + (".direct" if name == "direct" else "") for site in thresholds.COMPONENTS]
        table = summaries.signed(summaries.select(effects, treatment, variant, sites))
        cells = table[table.split == "test"].groupby(["site", "layer"])[["nie", "te"]].mean()
        shares = (cells.nie / cells.te).rename("share").reset_index()
        shares["site"] = shares.site.str.removesuffix(".direct")
        tables.append(shares.assign(treatment=treatment, effect=name))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(learned=[(row.site, row.layer) in plants.components(plant) for row in table.itertuples()])


def behaviour(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, float]]:
    """Mean P(refuse) of the first answer token by suite: whether the plant learned to refuse, and when not to."""
    table = pd.DataFrame([row for row in suite_rows() if row["suite"] in SUITES])
    refuse = tokenizer.convert_tokens_to_ids(invented.REFUSAL_OPENER)
    logp = first_token_logprobs(model, tokenizer, table["prompt"].tolist())
    means = table.assign(p=logp[:, refuse].exp().numpy()).groupby("suite").p.mean()
    return [("behaviour", str(suite), float(value)) for suite, value in means.items()]


def planted_neurons(plant: Plant, found: Neurons, this: Study) -> list[tuple[str, str, float]]:
    """How well estimates rank the neurons that could move above the last layer's others; and the share of the top 8."""
    d_mlp = this.subject.d_mlp
    chosen = plant.neurons(d_mlp)
    rows: list[tuple[str, str, float]] = []
    for name, score in localise.neuron_scores(found, this).items() if len(chosen) else ():
        last = score.reshape(-1, d_mlp)[-1]
        member = np.isin(np.arange(d_mlp), chosen)
        rows += [(name, what, value) for what, value in ranking_quality(member.tolist(), last.tolist()).items()]
        rows.append(
            (name, f"learned among the top {TOP}", float(member[np.argsort(-last, kind="stable")[:TOP]].mean()))
        )
    return rows


def run_plants(share: str = "1/1", folder: Path = paths.CALIBRATION, chosen: Iterable[Plant] | None = None) -> None:
    """Measure every plant of this share ("2/3": the second of three) that has no file yet, and join what there is."""
    own = list(plan_plants() if chosen is None else chosen)[slice(*campaign.every(share))]
    todo = [plant for plant in own if not _is_there(folder, plant)]
    print(f"plants: {len(todo)} to grow and measure", flush=True)
    start = time.monotonic()
    for done, plant in enumerate(todo, start=1):
        for name, table in measure_plant(plant).items():
            files.write_table(table, _path(folder, plant, name))
        each = (time.monotonic() - start) / done
        print(
            f"{done}/{len(todo)} {plant.name}: {each:.0f} s each, {each * (len(todo) - done) / 60:.0f} min left",
            flush=True,
        )
    join_plants(folder)


def _path(folder: Path, plant: Plant, table: str) -> Path:
    return folder / ".parts" / f"{plant.name}.{table}.parquet"


def _is_there(folder: Path, plant: Plant) -> bool:
    known = folder / "plants.parquet"
    if known.is_file() and ((read_plants(folder).kind == plant.kind) & (read_plants(folder).seed == plant.seed)).any():
        return True
    return all(_path(folder, plant, name).is_file() for name in SCHEMAS)


def join_plants(folder: Path = paths.CALIBRATION) -> None:
    """Put all plants that there are, also those of earlier joins, into the shipped tables."""
    for name, schema in SCHEMAS.items():
        key = [
            column
            for column in schema
            if schema[column] != "float" and column not in ("note", "n_pairs", "n_topics", "code")
        ]
        shipped = folder / f"{name}.parquet"
        parts = [
            *([shipped] if shipped.is_file() else []),
            *sorted((folder / ".parts").glob(f"plant-*.{name}.parquet")),
        ]
        if parts:
            table = pd.concat([pd.read_parquet(path) for path in parts], ignore_index=True)
            files.write_table(table.drop_duplicates(key, keep="last").sort_values(key, ignore_index=True), shipped)


def read_plants(folder: Path = paths.CALIBRATION, table: str = "plants") -> pd.DataFrame:
    """A shipped table of the plants. InputError if it is not there."""
    return files.read_table(folder / f"{table}.parquet", SCHEMAS[table])


def by_kind(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """For the figure: mean share and range over seeds, a row a kind, effect and component ("attn 4").

    Kinds stand in the order of the plan.
    """
    part = table[table.treatment == treatment]
    part = part.assign(component=part.site.str.removesuffix("_out") + " " + part.layer.astype(str))
    names = {"total": "passes through (indirect effect)", "direct": "writes (direct effect)"}
    keys = ["kind", "effect", "site", "layer", "component", "learned"]
    shares = part.groupby(keys, sort=False).share
    mean = shares.agg(estimate="mean", low="min", high="max").reset_index()
    order = {kind: i for i, kind in enumerate(KINDS)}
    mean = mean.assign(place=mean.kind.map(order), first=mean.effect != "total").sort_values(
        ["first", "place", "site", "layer"]
    )
    return mean.assign(effect=mean.effect.map(names))[
        ["kind", "effect", "component", "learned", "estimate", "low", "high"]
    ]


def found(table: pd.DataFrame) -> pd.DataFrame:
    """For each plant, treatment and effect: the component with the largest share, and whether the plant learned there."""
    top = table.loc[table.groupby(["kind", "seed", "treatment", "effect"]).share.idxmax()]
    return top.assign(component=top.site.str.removesuffix("_out") + " " + top.layer.astype(str))


def tally(evidence: pd.DataFrame) -> pd.DataFrame:
    """Verdicts of the registered rules and of the corrected C1, a row a kind: seeds "supported / contradicted / neither".

    A claim counts the seeds in which it was measured.
    """
    said: dict[tuple[str, str], list[str]] = {}
    owner = evidence.model.str.removesuffix(UNTRAINED)
    for plant in plan_plants():
        own = evidence[owner == plant.name]
        for rule, one in one_draw.judged(own, plant.name):
            if one.claim in set(own.claim) and (rule == "registered" or one.claim == "C1"):
                name = one.claim + (CORRECTED if rule == "corrected" else "")
                said.setdefault((plant.kind, name), []).append(one.verdict)
    cells = {key: (v.count("supported"), v.count("contradicted"), len(v)) for key, v in said.items()}
    text = {key: f"{yes} / {no} / {n - yes - no}" for key, (yes, no, n) in cells.items()}
    return pd.Series(text).unstack().loc[[kind for kind in KINDS if (kind, "C1") in text]]
