"""The library behind the notebooks: from a model and a prompt set to effects, statistics, figures and verdicts.

Its packages stand on floors, and each imports only from the floors below it; CONTRIBUTING.md draws them.
"""

import warnings

# Libraries ask for a widget that draws progress bars; ours are plain text, so nothing is missing.
warnings.filterwarnings("ignore", message="IProgress not found")
