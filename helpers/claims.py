"""What a run has found so far, and the notebooks that found it: tables that need no model.

`answers_so_far` is the run's page in short, `notebook_table` the way through the notebooks.
"""

from __future__ import annotations

from companion.run.overview import notebook_table
from companion.run.overview import verdict_table as answers_so_far

__all__ = ["answers_so_far", "notebook_table"]
