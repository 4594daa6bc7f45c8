"""What a fresh update is made from; layers with another start than V = 0 bring their own function."""

from typing import NamedTuple

import torch
from torch import nn

from brushstroke.adapter import LoraConfig
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.init import INITS
from brushstroke.sites import Site


class Start(NamedTuple):
    """What a fresh update is made from."""

    config: LoraConfig
    site: Site
    module: nn.Module
    rank: int
    scale: float
    generator: torch.Generator


def zero_V(start: Start) -> LowRank:
    """U by the config's rule and V = 0, so that the model is its base at first."""
    U_rows = INITS[start.config.init](start.site.d, start.rank, start.generator)
    return LowRank(U_rows.mT, torch.zeros(start.rank, start.site.h), start.scale)
