"""How the shipped models were made: the embedded chat model and its invented language, plants, and compiled models.

It stands beside `companion.evidence`; only the calibration, the exercises and notebooks 01 and 07 import it.

Public: `language`, `prompt_set` (the invented language, its prompts and suites), `training`, `shipping`,
`behaviour` (the embedded models, their folders and what they answer), `plants` (fine-tuned where one chooses), `compiled`
(models whose truth is known) with its `compiled_language`, `compiled_program`, `compiled_weights` and `compiled_truth`.
"""
