"""Rules that turn evidence rows into verdicts, as registered and as corrected, and the ledger of all verdicts.
It reads tables and measures nothing: rows come from `companion.evidence`, error rates of the rules from the calibration.

Public: verdict (rows by name, controls, precondition, verdicts), registered_rules (C1 to C7 as written down beforehand),
corrected_rules (the same claims where a rule was found to err), ledger (all verdicts, what is answered today, how well, and
what stands among many), page (the same for people).
"""
