"""What the notebooks import: prompts, pairs, clean runs, effects on disk, statistics, figures, verdicts."""
