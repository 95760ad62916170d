"""Attention against MLPs: what passes through a module, what it writes, which heads carry, and where those look.

Effects are those of the primary contrast (T2 - T2b where there are twins), signed by its TE.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from companion.base.display import NotDefined, passes_on
from companion.base.files import EFFECTS, EVIDENCE, read_table, write_table
from companion.base.paths import results_dir
from companion.evidence.layers import evidence_c2
from companion.mediation.estimands import prompt_tokens, user_header, with_difference
from companion.mediation.study import Study, control_study, normalisations, other_shipped
from companion.mediation.summaries import cell_means, primary, share_of_te, signed_contrast
from companion.mediation.sweeps import DIRECT_SITES, run_sweep
from companion.model.activations import eager_attention
from companion.prompts.positions import groups, token_labels
from companion.prompts.tokens import TokenPair

__all__ = ["attention_by_group", "attention_of_heads", "carrying_heads", "eager_attention", "enough_or_needed",
           "head_effects", "measure_modules", "mlp_shares", "normalised", "passing_and_writing", "signed_contrast",
           "write_module_evidence"]  # fmt: skip

Heads = Sequence[tuple[int, int]]
SHOWN = {"main": "raw", "per patch norm": "per length of the patch", "per parameter": "per parameter",
         "sufficiency": "enough (NIE0 alone)", "necessity": "needed (NIE1 alone)"}  # fmt: skip


def measure_modules(study: Study) -> pd.DataFrame:
    """Direct effects of attention and MLP outputs, total and direct effects of heads, at the last token; also as a file.

    One row a pair of T2 or T2b (of all treatments, where there is no T2), site, layer and head; T2 - T2b behind the others.
    """
    effects = with_difference(run_sweep(study, "modules")["effects"], study.twins)
    write_table(effects, results_dir(study.slug) / "03_modules.parquet")
    return effects


def passing_and_writing(totals: pd.DataFrame, modules: pd.DataFrame) -> pd.DataFrame:
    """Indirect and direct effects of every attention and MLP output as shares of TE, with intervals over topics.

    Direct effects are read out linearly with the final norm frozen, so that they add up to 1.
    """
    direct = signed_contrast(modules, None, DIRECT_SITES, outcome="contrast.frozen")
    parts = {"indirect": signed_contrast(totals), "direct": direct}
    return pd.concat([share_of_te(part).assign(effect=name, of=primary(totals)) for name, part in parts.items()])


def mlp_shares(study: Study, totals: pd.DataFrame, modules: pd.DataFrame) -> pd.DataFrame | NotDefined:
    """MLPs' share of the positive effects, direct and indirect, under each normalisation: the evidence rows of C2."""
    rows = evidence_c2(totals, modules, study.slug, normalisations(study))
    missing = "No share: the set has no jailbreak wrapper (T2), or no module has a positive effect on discover."
    return pd.DataFrame(rows, columns=list(EVIDENCE)) if rows else NotDefined(missing)


@passes_on
def normalised(shares: pd.DataFrame) -> pd.DataFrame:
    """The rows of `mlp_shares` that are drawn: raw, per patch norm, per parameter, and each direction alone."""
    shown = shares[shares.variant.isin(list(SHOWN))].sort_values("variant", key=lambda v: v.map(list(SHOWN).index))
    effect = shown.quantity.str.removeprefix("MLP share of ").replace({"NIE": "indirect effects"})
    return shown.assign(normalisation=shown.variant.map(SHOWN), effect=effect, low=shown.ci_low, high=shown.ci_high)


def enough_or_needed(totals: pd.DataFrame) -> pd.DataFrame:
    """NIE0, NIE1 and their difference, summed over the layers of attention and of the MLPs, in log-odds, with intervals."""
    effects = signed_contrast(totals)
    whole = effects.groupby(["pair_id", "topic", "site"], sort=False)[["nie0", "nie1"]].sum().reset_index()
    whole["difference"] = whole.nie1 - whole.nie0
    names = {"nie0": "enough (NIE0)", "nie1": "needed (NIE1)", "difference": "NIE1 - NIE0"}
    rows = pd.concat([cell_means(whole, value, ["site"]).assign(estimand=name) for value, name in names.items()])
    table = rows.set_index(["site", "estimand"])[["estimate", "low", "high"]]
    return table.sort_index(level=0, sort_remaining=False)


def carrying_heads(modules: pd.DataFrame, n: int = 3) -> list[tuple[int, int]]:
    """Layer and head of the `n` heads with the largest mean indirect effect on discover."""
    means = signed_contrast(modules, None, ["head"], split="discover").groupby(["layer", "head"]).nie.mean()
    return [(int(layer), int(head)) for layer, head in means.sort_values(ascending=False, kind="stable").index[:n]]


def head_effects(modules: pd.DataFrame) -> pd.DataFrame:
    """Mean indirect and direct effect of every head on test, in log-odds, with intervals; `carries`: a carrying head.

    Direct effects are those of the linear contrast: a layer's heads add up to its attention output.
    """
    direct = signed_contrast(modules, None, ["head.direct"], outcome="contrast.frozen")
    kinds = {"indirect": signed_contrast(modules, None, ["head"]), "direct": direct}
    rows = [cell_means(part, by=["layer", "head"]).assign(effect=name) for name, part in kinds.items()]
    table, chosen = pd.concat(rows, ignore_index=True), carrying_heads(modules)
    return table.assign(carries=[cell in chosen for cell in zip(table.layer, table["head"], strict=True)])


def attention_of_heads(study: Study, pair: TokenPair, heads: Heads) -> pd.DataFrame:
    """Where the last token looks, in the control and in the treated prompt: columns panel, head, position, token, weight.

    What stands before the user's words is one row, so that the weights of a head add up to 1 in each prompt.
    """
    before, rows = groups(pair, user_header(study.subject)), []
    start = int((before["system"] | before["header"]).sum())
    for side, weights in zip(("control", "treated"), _looks(study, pair, heads), strict=True):
        tokens = ["(before)", *token_labels(pair, side, study.subject.tokenizer)[start:]]
        for (layer, head), row in zip(heads, weights, strict=True):
            lumped = [float(row[:start].sum()), *row[start:].tolist()]
            place = {"position": range(len(tokens)), "token": tokens, "weight": lumped}
            rows.append(pd.DataFrame({"panel": f"{side} prompt", "head": f"{layer}.{head}", **place}))
    return pd.concat(rows, ignore_index=True)


def attention_by_group(study: Study, pairs: Sequence[TokenPair], heads: Heads) -> pd.DataFrame:
    """Mean share of the last token's attention on each group of tokens: groups (rows) by head and side (columns)."""
    found = []
    for pair in pairs:
        masks = groups(pair, user_header(study.subject))
        request = masks["request"] | masks["rest"]
        named = {"before": masks["system"] | masks["header"], "request": request, "wrapper": masks["wrapper"]}
        named |= {"end of the instruction": masks["last_instruction"], "template": masks["template"] | masks["last"]}
        for side, weights in zip(("control", "treated"), _looks(study, pair, heads), strict=True):
            for (layer, head), row in zip(heads, weights, strict=True):
                sums = {name: float(row[torch.from_numpy(mask)].sum()) for name, mask in named.items()}
                found.append({"head": f"{layer}.{head}", "side": side, **sums})
    return pd.DataFrame(found).groupby(["head", "side"], sort=False).mean().T


def _looks(study: Study, pair: TokenPair, heads: Heads) -> list[list[torch.Tensor]]:
    """For each side of a pair, each head's attention from the last token, of shape (position,)."""
    with torch.no_grad(), eager_attention(study.subject):
        sides = [study.subject.model(ids, output_attentions=True) for ids in prompt_tokens(study.subject, [pair])]
    return [[side.attentions[layer][0, head, -1].float().cpu() for layer, head in heads] for side in sides]


def write_module_evidence(study: Study, own: pd.DataFrame | NotDefined, model: str, profile: str) -> pd.DataFrame:
    """Write `03_evidence.csv`: the study's own rows (`mlp_shares`), then those of its relatives, measured by notebook 02."""
    measured = read_table(results_dir(study.slug) / "02_relatives.parquet", {**EFFECTS, "model": "str"})
    rows = [] if isinstance(own, NotDefined) else own[list(EVIDENCE)].to_dict("records")
    for label in other_shipped(model, profile):
        effects = measured[measured.model == label]
        rows += evidence_c2(effects, effects, label, normalisations(control_study(study, model, label)))
    table = pd.DataFrame(rows, columns=list(EVIDENCE))
    write_table(table, results_dir(study.slug) / "03_evidence.csv")
    return table
