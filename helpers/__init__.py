"""The face of the companion: what a notebook imports. Each helper is one step of a lesson, and composes calls of the library.

`model` loads a model and picks a pair, `prompts` shows pairs as tables, `patching` patches one pair, `statistics` gives
numbers with intervals, and `plots` writes a table and draws it. `layers` is lesson 02. What is computed stands in `companion/`.
"""
