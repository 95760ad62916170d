"""How often the method is wrong: the unchanged pipeline on models whose mechanism was built, and the error rates of its verdicts.

It stands on `companion.evidence` and `organisms`; it changes nothing in the pipeline and no rule reads it.

Public: `campaign` (measure a plan, stop and go on, join; read the shipped tables), `draws` (compiled models: the plan, a whole
study's evidence, verdicts without sampling error), `truths` (of no estimator: components knocked out, and a push that
knows the read-out), `plants` (a real model trained in one part), `localise` (what was built where), `rates` (error rates,
power, coverage, support by true value).
"""
