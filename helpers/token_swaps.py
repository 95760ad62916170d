"""The input's side of the token question, and interchange between prompts of unequal length.

Replacing tokens in the prompt asks what the model needs to read; replacing their activations asks where the treatment's
signal is. Both are interventions, on different variables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy import stats as st

from helpers import evidence, grid, mediation, outcomes, positions, summary
from helpers.errors import InputError
from helpers.grid import Patch
from helpers.study import Study
from helpers.subject import Subject
from helpers.tokens import Openers, TokenPair

UNEQUAL_SITES = ("resid_post", "attn_out", "mlp_out")


def neutral_token(study: Study) -> int:
    """The token that stands in for others: the commonest one of all instructions outside every named span."""
    header = positions.user_header(study.subject.tokenizer)
    counts: Counter[int] = Counter()
    for pair in study.pairs:
        counts.update(pair.control[positions.groups(pair, header)["rest"]].tolist())
    if not counts:
        raise InputError("no instruction has a token outside its spans: there is no neutral token to put in")
    return counts.most_common(1)[0][0]


def swapped(pair: TokenPair, mask: np.ndarray, neutral: int) -> tuple[Int[np.ndarray, "pos"], bool]:
    """The treated prompt with a group's tokens taken from the control, or made neutral where the two do not differ."""
    differs = bool((pair.control != pair.treated)[mask].any())
    return np.where(mask, pair.control if differs else neutral, pair.treated), differs


def input_effects(study: Study, treatment: str, names: Sequence[str], n: int = 80) -> pd.DataFrame:
    """Y1 of the treated prompt minus Y1 with one group replaced in the prompt: a row a test pair and group, in log-odds.

    Columns: pair_id, topic, treatment, split, position, effect, and whether the group was `swapped` or made neutral.
    Signed like TE on discover is up to the caller; a pair that lacks the group has no row.
    """
    header, neutral = positions.user_header(study.subject.tokenizer), neutral_token(study)
    rows = []
    chosen = [pair for pair in study.of(treatment) if pair.pair.split == "test"][:n]
    for group in mediation.batches(chosen, study.subject):
        masks = [positions.groups(p, header) for p in group]
        places = [(i, name) for name in names for i, found in enumerate(masks) if found[name].any()]
        made = [swapped(group[i], masks[i][name], neutral) for i, name in places]
        ids = np.stack([*(p.treated for p in group), *(ids for ids, _ in made)])
        plain, after = np.split(_log_odds(study.subject, ids, study.openers[treatment]), [len(group)])
        for (i, name), value, (_, differs) in zip(places, after, made, strict=True):
            pair = group[i].pair
            key = (pair.id, pair.topic, pair.treatment, pair.split, name)
            rows.append((*key, float(plain[i] - value), differs))
    columns = ["pair_id", "topic", "treatment", "split", "position", "effect", "swapped"]
    return pd.DataFrame(rows, columns=columns)


def _log_odds(subject: Subject, ids: Int[np.ndarray, "prompt pos"], openers: Openers) -> np.ndarray:
    found, step = [], mediation.pairs_at_once(subject, ids.shape[1])
    for part in torch.tensor(ids, device=subject.device).split(step):
        run = grid.clean_run(subject, part, keep=("resid",))
        found.append(outcomes.log_odds(subject, run.resid_post[-1][:, -1], openers).cpu().numpy())
    return np.concatenate(found)


def compare(table: pd.DataFrame, inputs: pd.DataFrame, treatment: str) -> tuple[pd.DataFrame, float]:
    """Both views by group, with intervals, and Spearman's rank correlation of their sizes.

    The activations' view is the mean indirect effect of the group's residual stream after the first layer, before much
    has moved. Rows, groups in the order of `table`: view, position, estimate, low, high (log-odds, signed by TE on discover).
    """
    part = evidence.signed(table[(table.treatment == treatment) & (table.outcome == "Y1") & (table.layer == 0)])
    part = part[(part.split == "test") & (part.site == "resid_post")]
    discover = table[(table.treatment == treatment) & (table.split == "discover")]
    signed = inputs.assign(effect=inputs.effect * np.sign(discover.te.mean()))
    common = [name for name in dict.fromkeys(part.position) if name in set(signed.position)]
    rank = {name: place for place, name in enumerate(common)}
    views = {"activations": (part, "nie"), "input": (signed, "effect")}
    made = [
        summary.cell_means(rows[rows.position.isin(common)], value, ["position"])
        .sort_values("position", key=lambda names: names.map(rank))
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


def side(pair: TokenPair, which: str, header: str) -> Side:
    """The control or the treated prompt of a pair on its own: with other prompts' sides it makes pairs of any length."""
    ids, offsets, start, text = (getattr(pair, name) for name in (which, f"{which}_offsets", f"{which}_start", "pair"))
    text = getattr(text, which)
    spans = {"treated": pair.pair.spans.get(which, {})}
    alone = TokenPair(
        replace(pair.pair, control=text, treated=text, spans=spans), ids, ids, offsets, offsets, start, start
    )
    masks = positions.groups(alone, header)
    return Side(ids, {name: int(np.flatnonzero(masks[name])[-1]) for name in positions.present(masks)})


def interchange_ends(
    subject: Subject, base: Side, source: Side, openers: Openers, names: Sequence[str], site: str = "resid_post"
) -> pd.DataFrame:
    """Y1 of the base prompt after the last token of a group takes the source's value there, whatever their lengths.

    Columns: position, layer, base (Y1 without a patch), patched, source (Y1 of the source prompt). Valid sites are vectors
    of one token: residual stream, attention output, MLP output. They hold no position of their own, but the source's
    prompt put it there: with rotary embeddings keys and queries are turned by position when a layer reads them, so later
    layers see the patched token at the base's distance, while what attention below had fetched stays as the source's
    distances made it. Keys, values and attention patterns of two lengths do not correspond, and neither do all tokens of
    a group: only its last one is patched.

    Raises:
        InputError: another site, or a group that one of the prompts lacks.
    """
    if site not in UNEQUAL_SITES:
        raise InputError(f"{site} of prompts of unequal length: expected one of {', '.join(UNEQUAL_SITES)}")
    if lacking := [name for name in names if name not in base.ends or name not in source.ends]:
        raise InputError(f"group {lacking[0]} is not in both prompts: leave it out")
    runs = [grid.clean_run(subject, torch.tensor(s.tokens[None], device=subject.device)) for s in (base, source)]
    places = [(name, layer) for name in names for layer in range(subject.n_layers)]
    patches = []
    for name, layer in places:
        where = torch.zeros_like(runs[0].tokens, dtype=torch.bool)
        where[0, base.ends[name]] = True
        value = runs[1].site(site, layer)[:, source.ends[name]][:, None]
        patches.append(Patch(site, layer, where, value=value))
    resid = grid.interchange(subject, runs[0], runs[0], patches)[0, :, 0]
    clean = [outcomes.log_odds(subject, run.resid_post[-1][0, -1], openers).item() for run in runs]
    patched = outcomes.log_odds(subject, resid, openers).cpu().numpy()
    return pd.DataFrame(places, columns=["position", "layer"]).assign(base=clean[0], patched=patched, source=clean[1])
