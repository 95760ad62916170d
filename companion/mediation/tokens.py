"""Mediation by token: effects of position groups and single positions at every layer, and of words in the prompt.

Replacing tokens in the prompt asks what the model needs to read; replacing their activations asks where the treatment's
signal is. In every network the residual stream of all positions together carries TE at every layer, and in the last layer
every position but the last carries nothing. Where a difference can have arrived at all follows from the attention masks:
with sliding windows it needs several layers to reach the last token, whatever was learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int
from scipy import stats as st

from companion.base.device import to_host
from companion.base.errors import InputError
from companion.mediation import estimands, outcomes, summaries
from companion.mediation.study import Study
from companion.model import activations, memory, replay
from companion.model.activations import CleanRun
from companion.model.architecture import Subject
from companion.model.interventions import Patch, position_mask
from companion.prompts import positions
from companion.prompts.tokens import Openers, TokenPair

SITES = ("resid_post", "attn_out", "mlp_out")
TREATMENTS = ("T1", "T2", "T2b")
PAIRS = 80  # a treatment
PLACES = {
    "last": "last token",
    "others": "all other tokens",
    "last_instruction": "last instruction token",
    "request": "verb and object",
}


def position_groups(study: Study) -> tuple[list[str], list[str]]:
    """Position groups that some pair of the generation and recognition treatments has, in reading order; and those none has.

    Groups that overlap others come last: the span of the request (verb and object), the differing tokens, all tokens.
    """
    header = positions.user_header(study.subject.tokenizer)
    places: dict[str, list[float]] = {}
    every: set[str] = set()
    for pair in study.of(*TREATMENTS) or study.pairs:
        masks = positions.groups(pair, header)
        every |= set(masks)
        for name in positions.present(masks):
            places.setdefault(name, []).append(float(np.flatnonzero(masks[name]).mean() / len(pair.control)))
    found = sorted(places, key=lambda name: float(np.mean(places[name])))
    spans = ["request"] if {"verb", "object"} & set(found) else []
    missing = sorted(every - set(found) - set(positions.OVERLAPPING))
    return [*found, *spans, "differ", "others", "all"], missing


# ---- where a difference can have arrived ----


def reached(
    visible: Sequence[Bool[np.ndarray, "query key"]], differ: Bool[np.ndarray, "pos"]
) -> Bool[np.ndarray, "layer pos"]:
    """Which positions' residual stream may differ after each layer, given where the tokens differ.

    >>> window = np.tril(np.ones((4, 4), bool)) & ~np.tril(np.ones((4, 4), bool), -2)
    >>> reached([window, window], np.array([True, False, False, False])).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0]])
    """
    rows, now = [], differ
    for mask in visible:
        now = now | (mask & now[None, :]).any(axis=1)
        rows.append(now)
    return np.stack(rows)


def arrival_layers(run: CleanRun, pair: TokenPair) -> Int[np.ndarray, "pos"]:
    """For each position the first layer after which a pair can differ there; the number of layers where none can."""
    layers = reached(activations.visible_keys(run), pair.control != pair.treated)
    return np.where(layers.any(0), layers.argmax(0), len(layers))


def earliest_layers(run: CleanRun, pairs: Sequence[TokenPair]) -> list[int]:
    """For each pair of a batch the first layer whose output at the last token can differ at all.

    It is -1 where the last token itself differs, and the number of layers where no layer's output can differ.
    """
    last = [(pair.control[-1] != pair.treated[-1], int(arrival_layers(run, pair)[-1])) for pair in pairs]
    return [-1 if differs else layer for differs, layer in last]


# ---- effects of groups ----


def token_effects(study: Study, treatments: Sequence[str] = TREATMENTS) -> pd.DataFrame:
    """Group by layer effects (Y1) in both directions, with T2 - T2b behind them, on test pairs of at most 80 a treatment.

    The residual stream at every group; attention and MLP outputs for T2 and T2b, at groups that overlap no other. Fewer pairs
    and layers where each is costly. A pair of another split, which only gives TE its sign, has one row.
    """
    study = study.thinned(PAIRS)
    names, _ = position_groups(study)
    layers = _mapped_layers(study)
    apart = [name for name in names if name not in positions.OVERLAPPING]
    residual, modules = (
        estimands.mediators(study.subject, sites, groups, layers)
        for sites, groups in ((SITES[:1], names), (SITES[1:], apart))
    )
    own = [name for name in treatments if name in ("T2", "T2b")] or treatments[:1]
    tables = []
    for treatment in treatments:
        pairs, wanted = study.of(treatment), [*residual, *(modules if treatment in own else [])]
        parts = [[pair for pair in pairs if (pair.pair.split == "test") is is_test] for is_test in (True, False)]
        for part, some in zip(parts, (wanted, [estimands.Mediator(SITES[0], 0)]), strict=True):
            tables += [estimands.measure_effects(study.subject, part, study.openers, some)] if part else []
    return estimands.with_difference(pd.concat(tables, ignore_index=True), study.twins)


def _mapped_layers(study: Study) -> list[int]:
    """The layers of a map over tokens: the first one, which tells what was read, and `Study.thinned_layers`."""
    return sorted({0, *study.thinned_layers})


def group_means(study: Study, table: pd.DataFrame, treatment: str, names: Sequence[str]) -> pd.DataFrame:
    """Mean effects on test of every site, group and layer: treatment, site, group, earliest, layer, estimate, low, high.

    Both directions are averaged and signed by TE on discover; `earliest` is the first layer at which a group can differ.
    """
    means = summaries.cell_means(_on_test(table, treatment), "nie", ["site", "position", "layer"])
    means = means[means.position.isin(names)].sort_values("position", key=_rank(names))
    earliest = means.position.map(earliest_by_group(study, treatment)).astype(float)
    means = means.rename(columns={"position": "group"}).assign(earliest=earliest, treatment=treatment)
    return means[["treatment", "site", "group", "earliest", "layer", "estimate", "low", "high"]]


def direction_means(table: pd.DataFrame, treatment: str, names: Sequence[str]) -> pd.DataFrame:
    """The residual stream's mean effects on test, one block of rows for sufficiency (NIE0) and one for necessity (NIE1).

    Rows are direction and group, columns layers. Where no pair of the treatment has a group, its row is left out.
    """
    test, ways = _on_test(table, treatment).query("site == 'resid_post'"), {"sufficiency": "nie0", "necessity": "nie1"}
    by = ["position", "layer"]
    means = pd.concat([summaries.cell_means(test, nie, by).assign(direction=way) for way, nie in ways.items()])
    wide = means.pivot(index=["direction", "position"], columns="layer", values="estimate")
    rows = [(way, name) for way in ways for name in names if (way, name) in wide.index]
    return wide.loc[rows].rename_axis(index=["direction", "group"])


def hand_over_curves(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Share of TE in the residual stream of some places by layer, on test: treatment, where, layer, estimate, low, high."""
    part = table[table.position.isin(PLACES) & (table.site == "resid_post")]
    made = summaries.share_of_te(_on_test(part, treatment), by=["position", "layer"])
    made = made.assign(treatment=treatment, where=made.position.map(PLACES))
    return made[["treatment", "where", "layer", "estimate", "low", "high"]]


def _on_test(table: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Signed effects of one treatment on Y1, test split."""
    return summaries.signed(table[(table.treatment == treatment) & (table.outcome == "Y1")]).query("split == 'test'")


def _rank(names: Sequence[str]) -> Callable[[pd.Series], pd.Series]:
    return lambda column: column.map({name: place for place, name in enumerate(names)})


def earliest_by_group(study: Study, treatment: str) -> dict[str, int]:
    """The first layer at which a group can differ in any pair of a treatment; the number of layers where none can."""
    header = positions.user_header(study.subject.tokenizer)
    found: dict[str, int] = {}
    for group in estimands.batches(study.of(treatment.removesuffix("-T2b")), study.subject):
        run = estimands.run_clean(study.subject, group[:1]).control
        for pair in group:
            layers = arrival_layers(run, pair)
            for name, mask in positions.groups(pair, header).items():
                found[name] = int(layers[mask].min(initial=found.get(name, study.subject.n_layers)))
    return found


def position_effects(study: Study, pair: TokenPair) -> pd.DataFrame:
    """Effect of every single token's residual stream in one pair: layer, position, token, earliest, nie (log-odds).

    Signed by the pair's own TE; `earliest` is the first layer at which the token can differ. Layers are those of
    `token_effects`.
    """
    subject, n_pos = study.subject, len(pair.control)
    batch = estimands.run_clean(subject, [pair])
    places = [(layer, position) for layer in _mapped_layers(study) for position in range(n_pos)]
    masks = [position_mask(batch.control.tokens, position) for position in range(n_pos)]
    patches = [Patch("resid_post", layer, masks[position]) for layer, position in places]
    control, treated = (
        replay.interchange(subject, base, source, patches)[:, :, 0]
        for base, source in ((batch.control, batch.treated), (batch.treated, batch.control))
    )
    cells = estimands.score_cells(subject, batch, (control, treated), study.openers[pair.pair.treatment])
    made = estimands.with_estimands(pd.DataFrame({name: np.resize(y[0], len(places)) for name, y in cells.items()}))
    nie = np.sign(made.nie0.iloc[-1]) * (made.nie0 + made.nie1) / 2  # the last cell of the last layer has all of TE
    text = [positions.token_labels(pair, side, subject.tokenizer) for side in ("control", "treated")]
    shown = [a if a == b else f"{a}/{b}" for a, b in zip(*text, strict=True)]
    earliest = arrival_layers(batch.control, pair).astype(float)
    table = pd.DataFrame(places, columns=["layer", "position"])
    return table.assign(token=table.position.map(dict(enumerate(shown))), earliest=earliest[table.position], nie=nie)


# ---- words replaced in the prompt ----


def neutral_token(study: Study) -> int:
    """The token that stands in for others: the commonest one of all instructions outside every named span."""
    header = positions.user_header(study.subject.tokenizer)
    counts: Counter[int] = Counter()
    for pair in study.pairs:
        counts.update(pair.control[positions.groups(pair, header)["rest"]].tolist())
    if not counts:
        raise InputError("no instruction has a token outside its spans: there is no neutral token to put in")
    return counts.most_common(1)[0][0]


def replaced_tokens(pair: TokenPair, mask: np.ndarray, neutral: int) -> tuple[Int[np.ndarray, "pos"], bool]:
    """The treated prompt with a group's tokens taken from the control, or made neutral where the two do not differ."""
    differs = bool((pair.control != pair.treated)[mask].any())
    return np.where(mask, pair.control if differs else neutral, pair.treated), differs


def input_effects(study: Study, treatment: str, names: Sequence[str]) -> pd.DataFrame:
    """Y1 of the treated prompt minus Y1 with one group replaced in the prompt: a row a test pair and group, in log-odds.

    Columns: pair_id, topic, treatment, split, position, effect, and whether the group was `swapped` for the control's or
    made neutral. Not signed; a pair that lacks the group has no row. At most 80 pairs.
    """
    header, neutral = positions.user_header(study.subject.tokenizer), neutral_token(study)
    rows = []
    chosen = [pair for pair in study.of(treatment) if pair.pair.split == "test"][:PAIRS]
    for group in estimands.batches(chosen, study.subject):
        masks = [positions.groups(p, header) for p in group]
        places = [(i, name) for name in names for i, found in enumerate(masks) if found[name].any()]
        made = [replaced_tokens(group[i], masks[i][name], neutral) for i, name in places]
        ids = np.stack([*(p.treated for p in group), *(ids for ids, _ in made)])
        plain, after = np.split(_log_odds(study.subject, ids, study.openers[treatment]), [len(group)])
        for (i, name), value, (_, differs) in zip(places, after, made, strict=True):
            rows.append((*estimands.pair_key(group[i]), name, float(plain[i] - value), differs))
    return pd.DataFrame(rows, columns=[*estimands.PAIR_KEYS, "position", "effect", "swapped"])


def _log_odds(subject: Subject, ids: Int[np.ndarray, "prompt pos"], openers: Openers) -> np.ndarray:
    found, step = [], memory.pairs_at_once(subject, ids.shape[1])
    for part in subject.tensor(ids).split(step):
        run = activations.clean_run(subject, part, keep=("resid",))
        found.append(to_host(outcomes.log_odds(subject, run.resid_post[-1][:, -1], openers)))
    return np.concatenate(found)


def compare_views(table: pd.DataFrame, inputs: pd.DataFrame, treatment: str) -> tuple[pd.DataFrame, float]:
    """Effects of activations and of words by group, with intervals, and Spearman's rank correlation of their sizes.

    The activations' view is the mean indirect effect of the group's residual stream after the first layer, before much
    has moved. Rows, groups in the order of `table`: view, position, estimate, low, high (log-odds, signed by TE on discover).
    """
    part = _on_test(table[table.layer == 0], treatment).query("site == 'resid_post'")
    discover = table[(table.treatment == treatment) & (table.split == "discover")]
    signed = inputs.assign(effect=inputs.effect * np.sign(discover.te.mean()))
    common = [name for name in dict.fromkeys(part.position) if name in set(signed.position)]
    views = {"activations": (part, "nie"), "input": (signed, "effect")}
    made = [
        summaries.cell_means(rows[rows.position.isin(common)], value, ["position"])
        .sort_values("position", key=_rank(common))
        .assign(view=name)
        for name, (rows, value) in views.items()
    ]
    both = pd.concat(made, ignore_index=True)[["view", "position", "estimate", "low", "high"]]
    sizes = both.pivot(index="position", columns="view", values="estimate").abs().round(6)
    return both, float(st.spearmanr(sizes["activations"], sizes["input"]).statistic)


# ---- prompts of unequal length ----


@dataclass(frozen=True)
class Side:
    """One prompt as token ids, and the position of the last token of each of its groups."""

    tokens: Int[np.ndarray, "pos"]
    ends: dict[str, int]


def one_side(pair: TokenPair, which: str, header: str) -> Side:
    """The control or the treated prompt of a pair on its own: with other prompts' sides it makes pairs of any length."""
    ids, offsets, start = (getattr(pair, name) for name in (which, f"{which}_offsets", f"{which}_start"))
    text, spans = getattr(pair.pair, which), {"treated": pair.pair.spans.get(which, {})}
    alone = replace(pair.pair, control=text, treated=text, spans=spans)
    masks = positions.groups(TokenPair(alone, ids, ids, offsets, offsets, start, start), header)
    return Side(ids, {name: int(np.flatnonzero(masks[name])[-1]) for name in positions.present(masks)})


def interchange_ends(
    subject: Subject, base: Side, source: Side, openers: Openers, names: Sequence[str]
) -> pd.DataFrame:
    """Y1 of the base prompt with the residual stream of a group's last token set to the source's, whatever their lengths.

    Columns: position, layer, base (Y1 without a patch), patched, source (Y1 of the source prompt). With rotary embeddings
    later layers see the patched token at the base's distance, while what attention below had fetched stays as the
    source's distances made it. Other tokens of two lengths do not correspond, nor do keys, values and attention patterns.

    Raises InputError for a group that one of the prompts lacks.
    """
    if lacking := [name for name in names if name not in base.ends or name not in source.ends]:
        raise InputError(f"group {lacking[0]} is not in both prompts: leave it out")
    runs = [activations.clean_run(subject, subject.tensor(s.tokens[None])) for s in (base, source)]
    places = [(name, layer) for name in names for layer in range(subject.n_layers)]
    patches = []
    for name, layer in places:
        value = runs[1].resid_post[layer][:, source.ends[name]][:, None]
        patches.append(Patch("resid_post", layer, position_mask(runs[0].tokens, base.ends[name]), value=value))
    resid = replay.interchange(subject, runs[0], runs[0], patches)[0, :, 0]
    clean = [outcomes.log_odds(subject, run.resid_post[-1][0, -1], openers).item() for run in runs]
    patched = to_host(outcomes.log_odds(subject, resid, openers))
    return pd.DataFrame(places, columns=["position", "layer"]).assign(base=clean[0], patched=patched, source=clean[1])
