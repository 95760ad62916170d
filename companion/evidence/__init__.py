"""Evidence rows for the claims, one file a group of claims. Rows carry intervals; what they mean is judged in `companion.claims`.

Public: layers (C1, C2, C3 with its probes, and the preconditions; topics and wrapper families, or verbs, as two samples), tokens
(C4, C5c), neurons (C5a, C5b, C7), steering (C6).
"""
