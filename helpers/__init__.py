"""The face of the companion: what a notebook imports. Each helper is one step of a lesson, and composes calls of the library.

`model` loads a model and patches a pair, `prompts` shows pairs and answers, `plots` draws, `claims` says what a run has found.
Each other module belongs to one lesson: `layers`, `modules`, `neurons`, `tokens`, `steering`, `calibration`.
"""
