"""How often the method is wrong: the unchanged pipeline on models whose mechanism was built, and the error rates of its verdicts.

It stands on `companion.evidence` and `organisms`; it changes nothing in the pipeline and no rule reads it.

Public: `campaign` (measure a plan, stop and go on, join; read the shipped tables), `draws` (compiled models: the plan, a whole
study's evidence, verdicts without sampling error), `ideal_push` (the truth of C6), `knock_out` (a truth of no estimator:
components knocked out), `plants` (a real model trained in one part), `localise` (what was built where), `rates` (error rates,
power, coverage, support by true value).
"""
