"""How one training step is computed: packed rows, exact attention, own functions, the loss.

It knows no run, no file and no optimiser: those are `training`'s.
"""

from brushstroke.packed.cross_entropy import LossFunction
from brushstroke.packed.prepare import Prepared, prepare

__all__ = ["LossFunction", "Prepared", "prepare"]
