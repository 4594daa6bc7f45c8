"""The maths of low-rank updates: pure functions and frozen values on tensors.

It knows no module, no file and no model.
"""

from brushstroke.lowrank.factors import LowRank
from brushstroke.lowrank.spectra import Svd, svd
from brushstroke.lowrank.update import Update

__all__ = ["LowRank", "Svd", "Update", "svd"]
