"""Makes new updates that start with V = 0.

A layer that starts in another way defines its own function.
"""

from typing import NamedTuple

import torch
from torch import nn

from brushstroke.adapter import LoraConfig
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.init import INITS
from brushstroke.sites import Site


class Start(NamedTuple):
    """The inputs from which a new update is made."""

    config: LoraConfig
    site: Site
    module: nn.Module
    rank: int
    scale: float
    generator: torch.Generator


def fresh_lora(start: Start) -> LowRank:
    """U by the config's rule and V = 0, so that the model first computes exactly what its base computes."""
    U_rows = INITS[start.config.init](start.site.d, start.rank, start.generator)
    return LowRank(U_rows.mT, torch.zeros(start.rank, start.site.h), start.scale)
