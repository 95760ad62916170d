"""One language model, replayed exactly: loading and checking it, clean runs, interventions, and how much fits into memory.
It knows tokens and activations but no prompts; every fast path is held equal to one full forward pass per intervention.

Public: load (a model by name, also from the hub), architecture (a model's parts, and what is known of it), activations
(clean runs and hooks), interventions (patches), replay (effects of patches up the grid of cells; the same by full
forward passes), readout (logits), memory (sizes and placement), verify (the check of every model).
"""
