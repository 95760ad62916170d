"""One language model, replayed exactly: loading and checking it, clean runs, interventions, and how much fits into memory.
Every fast path here is held equal to one full forward pass per intervention.
"""
