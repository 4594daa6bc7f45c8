"""The mathematics of low-rank updates: pure functions and frozen values on tensors.

Does not use modules, files or models.
"""

from brushstroke.lowrank.factors import LowRank
from brushstroke.lowrank.spectra import Svd, svd
from brushstroke.lowrank.update import Update

__all__ = ["LowRank", "Svd", "Update", "svd"]
