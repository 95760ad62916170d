"""Evidence rows for the claims, one file a group of claims: layers, tokens, neurons, gating, steering.
Rows carry intervals; what they mean is judged in `companion.claims`.
"""
