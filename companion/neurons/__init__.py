"""Single MLP neurons and sets of them at the last token: exact effects, sparsity, adjacency, and whether a set gates.
It measures a `Study` and makes tables; evidence rows and verdicts are made elsewhere.

Public: `single` (effects, their table and ranking), `closed_form` (the last layer without running it), `sets` (joint effects,
curves), `screening` (gradient estimates), `sparsity` (k90, areas, Gini), `adjacency` (Moran's I, windows), `clamping` (four
cells), `gating` (gate index), `teacher_forcing` and `timing` (whole answers under a clamp), `figure_tables`.
"""
