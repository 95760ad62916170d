"""Causal mediation: the four cells of every pair and mediator, the estimands made of them, and the sweeps over a prompt set.
It stands on `companion.model` and measures only: what its numbers mean is judged in `companion.claims`.

Public: study (a model with its pairs), estimands (cells and effects), outcomes (Y1, Y2), sweeps (whole prompt sets, parts
on disk), summaries (shares and means with intervals), tokens (position groups), path_specific (what carries the signal on),
interaction (where it is computed), probes (C3), reachability (the light cone), control_models (twins and other seeds),
precision (noise of half precision).
"""
