"""Figures, each drawn from one tidy table by a function that computes no statistics. It imports no torch."""
