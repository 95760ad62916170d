"""Figures, each drawn from one tidy table by a function that computes no statistics. It imports no torch.

Public: style (the look, what a figure is, plots that notebooks share), figures (draw, save, index), and modules for the
figures of several notebooks: layers (00 to 03, 05, 08), neurons (04, 04b, 06), calibration (07). view is the interactive
map of one pair.
"""
