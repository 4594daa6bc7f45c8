"""How rows run in one pass: packed without padding, exact attention, fused functions, logits and loss.

It knows no run, no file and no optimiser: those are `training`'s. Prompts and answers are `inference`'s.
"""

from brushstroke.packed.cross_entropy import LossFunction
from brushstroke.packed.prepare import Prepared, prepare

__all__ = ["LossFunction", "Prepared", "prepare"]
