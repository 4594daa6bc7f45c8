"""Runs several rows in one pass: packing without padding, exact attention, fused functions, logits and loss.

It has no training loop, files or optimiser (see `training`), and no prompts or answers (see `inference`).
"""

from brushstroke.packed.cross_entropy import LossFunction
from brushstroke.packed.prepare import Prepared, prepare

__all__ = ["LossFunction", "Prepared", "prepare"]
