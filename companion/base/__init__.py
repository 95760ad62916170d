"""What everything stands on: paths, files, names of models, thresholds, and what stands in place of a missing result.

It imports nothing else of this project; at module level all but `chat`, `device` and `thresholds` need the standard
library only, since the command line checks its flags with them.

Public: chat (how a template renders prompts, and what it does beside), device (the processor or a GPU, its free memory),
display (progress, NotDefined), errors, files (JSON, tables, hashes), folders (checks of models that a user names), gguf (files
of that format, and their models), hub (names, caches and errors of the hub), paths, smollm2 (the model of that name),
thresholds (and quantity names).
"""
