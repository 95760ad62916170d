"""How the shipped models were made: the embedded chat model and its invented language, plants, and compiled models.

It stands beside `companion.evidence`; only the calibration and the command line import it.
"""
