"""Probes for C3: can harmfulness be read off an early layer better than off the words alone?

A linear probe on activations is compared with a linear probe on token counts. Both are fitted on the discover split and
scored on the topics of the test split, whose stems they have not seen. Only tokens that are the same in both prompts of
a pair are read: what the probe finds there was carried in by context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from companion.base.device import to_host
from companion.base.errors import InputError
from companion.mediation.estimands import batches, run_clean
from companion.model.architecture import Subject
from companion.prompts import positions
from companion.prompts.tokens import TokenPair
from companion.stats import bootstrap, clusters


def shared_token_features(
    subject: Subject, pairs: Sequence[TokenPair], layer: int
) -> tuple[list[TokenPair], Float[np.ndarray, "pair side d"]]:
    """Residual stream after `layer`, averaged over the tokens behind the first difference that both prompts share.

    Sides are control (0) and treated (1); pairs come back in the order of the rows.
    """
    header = positions.user_header(subject.tokenizer)
    ordered, rows = [], []
    for group in batches(pairs, subject):
        batch = run_clean(subject, group)
        mask = subject.tensor(positions.stack(group, header, "shared"))[..., None]
        n_shared = mask.sum(1).clamp(min=1)  # a pair may share no token: then there is nothing to read
        sides = [(run.resid_post[layer] * mask).sum(1) / n_shared for run in (batch.control, batch.treated)]
        rows.append(to_host(torch.stack(sides, dim=1).float()))
        ordered += group
    return ordered, np.concatenate(rows)


def token_counts(pairs: Sequence[TokenPair]) -> Float[np.ndarray, "pair side vocab"]:
    """How often each token that occurs at all is in the control (side 0) and treated prompt (side 1)."""
    used = np.unique(np.concatenate([ids for p in pairs for ids in (p.control, p.treated)]))
    sides = [[(used[:, None] == ids).sum(1) for ids in (p.control, p.treated)] for p in pairs]
    return np.array(sides, dtype=float)


def held_out_scores(
    features: Float[np.ndarray, "pair side feature"], discover: Bool[np.ndarray, "pair"], test: Bool[np.ndarray, "pair"]
) -> Float[np.ndarray, "test side"]:
    """Decision scores on the test pairs of a logistic probe (treated against control) fitted on the discover pairs."""
    if not discover.any() or not test.any():
        raise InputError("a probe needs pairs in the discover and in the test split: give the treatment more topics")
    train = features[discover].reshape(-1, features.shape[-1])
    labels = np.tile([0, 1], int(discover.sum()))
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train, labels)
    return probe.decision_function(features[test].reshape(-1, features.shape[-1])).reshape(-1, 2)


def auroc(
    scores: Mapping[str, Float[np.ndarray, "pair side"]], topics: Sequence[str]
) -> tuple[bootstrap.Estimates, tuple[str, ...]]:
    """AUROC of each set of scores, then the gain of the first over the second, topics resampled.

    The AUROC counts, over all (treated, control) prompts of any two pairs, how often the treated one scores higher
    (ties count half). With one weight a topic it is a quadratic form in the weights, so all resamples are two matrix
    products.
    """
    names, codes = np.unique(np.asarray(topics), return_inverse=True)
    member = np.eye(len(names))[codes]
    wins = []
    for values in scores.values():
        treated, control = values[:, 1][:, None], values[:, 0][None, :]
        wins.append(member.T @ ((treated > control) + 0.5 * (treated == control)) @ member)
    sizes = member.sum(axis=0)

    def statistic(weights: Float[np.ndarray, "rep topic"], _: np.ndarray) -> Float[np.ndarray, "rep stat"]:
        trials = (weights @ sizes) ** 2
        areas = [np.einsum("rc,cd,rd->r", weights, table, weights) / trials for table in wins]
        return np.stack([*areas, areas[0] - areas[1]], axis=1)

    # Sums whose resampled columns are the topics' weights themselves: column c is 1 in cluster c.
    eye, strata = np.eye(len(names)), np.zeros(len(names), dtype=int)
    columns = pd.DataFrame({"topic": names})
    sums = clusters.ClusterSums(eye, eye.copy(), columns, pd.Index(names), strata)
    return bootstrap.bootstrap(sums, statistic), (*scores, "gain")
