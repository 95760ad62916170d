"""How often the method is wrong: the unchanged pipeline on models whose mechanism was built, and the error rates of its verdicts.
It stands on `companion.evidence` and `organisms`; it changes nothing in the pipeline and no rule reads it.

Public: `campaign` (measure a plan, stop and go on, join; read the shipped tables), `draws` (compiled models: the plan, a study's
evidence, verdicts without sampling error), `truths` (what was built where, and who finds it; components knocked out; a push that
knows the read-out), `plants` (a real model trained in one part), `rates` (error rates, power, coverage, support by true value).
"""
