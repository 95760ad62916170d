"""The face of the companion: what a notebook imports. Each helper is one step of a lesson, and composes calls of the library.

`model` loads a model, picks a pair and patches it, `prompts` shows pairs, answers and the numbers of all pairs, `plots` writes a
table and draws it, and `claims` says what a run has found. Each other module belongs to one lesson: `layers`, `modules`,
`neurons`, `tokens`, `steering`, `calibration`. What is computed stands in `companion/`.
"""
