"""Steering as a defence: directions, published methods and our own, budgets, and the experiment that compares them.

It stands on `generation` (hooks and steered answers) and `mediation`; what counts as evidence is `companion.evidence`. Public:
extraction (activations, directions), experiment (prompts in their roles, how much is tried, answers of one model), methods and
adasteer (ways to steer), budget (L2 size, costs over strengths), comparison (all methods on equal terms, rivals, random
directions, refits), trial (all methods on the test prompts, and their tables), indirect_effects (mediation under steering).
"""
