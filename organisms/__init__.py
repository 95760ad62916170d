"""How the shipped models were made: the embedded chat model and its invented language, compiled models, a refuser.

It stands beside `companion.evidence`; only the calibration and the exercises import it.

Public: `language` (the invented language as training shows it, its pairs and suites), `training` (the embedded models and what
they answer), `english` (the plain-English pairs), `refuser` and `refusal_rates` (the adapter of `smollm2-refuser` and what it
refuses), `compiled` (models whose truth is known) with its `compiled_language`,
`compiled_design`, `compiled_program` and `compiled_truth`.
"""
