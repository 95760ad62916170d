"""Causal mediation: the four cells of every pair and mediator, the estimands made of them, and the sweeps over a prompt set.
It measures and never judges.
"""
