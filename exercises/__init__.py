"""Exercises of the notebooks: solutions and checks are the source, the notebooks in this folder are made from them.

In a notebook of this folder: `from exercises import check`, then `check("02-1", my_function)`.
"""

from exercises.judging import check

__all__ = ["check"]
