"""The command line: what a run is asked for, which notebooks are stale, running them, sharing their work, and checking it all.

It measures and judges nothing itself, stands on all other packages, and nothing else imports it.

Public: cli (flags and commands), settings (what is asked for), runner and notebooks (running), freshness (what is up to
date), overview (tables of whole runs), shards (jobs), checks (tests and the lock).
"""
