"""What the notebooks import: prompts, pairs, clean runs, effects on disk, statistics, figures, verdicts."""

import warnings

# Libraries ask for a widget that draws progress bars; ours are plain text, so nothing is missing.
warnings.filterwarnings("ignore", message="IProgress not found")
