"""Single MLP neurons and sets of them at the last token: exact effects, sparsity, adjacency, and whether a set gates.
It measures a `Study` and makes tables; evidence rows and verdicts are made elsewhere.

Public: `single` (effects, their table and ranking), `closed_form` (the last layer without running it), `sets` (joint effects,
curves, k90, Gini), `screening` (gradient estimates), `adjacency` (Moran's I, windows), `clamping` (four cells), `gating`
(gate index, the four tests), `timing` (whole answers under a clamp).
"""
