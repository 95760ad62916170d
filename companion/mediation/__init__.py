"""Causal mediation: the four cells of every pair and mediator, the estimands made of them, and the sweeps over a prompt set.
It stands on `companion.model` and measures only: what its numbers mean is judged in `companion.claims`.

Public: study (a model with its pairs, control models, precision), estimands (cells and effects), outcomes (Y1, Y2), sweeps
(whole prompt sets, parts on disk), summaries (shares and means with intervals), mechanisms (where the decision is computed,
what carries it on, which tokens hold it, the light cone).
"""
