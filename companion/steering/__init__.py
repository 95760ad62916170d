"""Steering as a defence: directions, published methods and our own, budgets, and the experiment that compares them.

It stands on `generation` (hooks and steered answers), `mediation` and `neurons`; what counts as evidence is `companion.evidence`.
Public: prompts (roles and splits), extraction (activations, directions, files), experiment (trials of one model), methods and
adasteer (ways to steer), budget (L2 size, trade-off curves), comparison (all methods on equal terms, controls: random, moved,
other gates), robustness (refits, families left out, an attacker), indirect_effects (mediation under steering), figure_tables.
"""
