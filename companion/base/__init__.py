"""What everything stands on: paths, files, names of models, thresholds, and what stands in place of a missing result.

At module level all but `chat`, `device` and `thresholds` need the standard library only: the command line checks flags with them.

Public: chat (templates), device (processor or GPU), display (progress, NotDefined), errors, files (JSON, tables, hashes), folders
(checks of models that a user names), gguf (files of that format), hub (its names, caches, errors), paths, smollm2, thresholds.
"""
