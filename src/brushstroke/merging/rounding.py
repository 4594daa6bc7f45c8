"""Rounds a sum of weight and update to the dtype of the weight: to nearest, or stochastically.

A number between two neighbours of a half precision becomes the upper one with the probability of its
distance from the lower one: on average nothing is lost, however small the update is.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.checks import check_choice, check_integer
from brushstroke.lowrank.matmul import HALF
from brushstroke.philox import rounding_bits

Mode = Literal["auto", "nearest", "stochastic"]
KEPT = 0.995  # share of an update; where nearest keeps less, auto rounds stochastically
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Rounding:
    """How sums are rounded to bf16 and fp16; other dtypes are always rounded to nearest.

    Args:
        mode: auto is nearest at sites where that keeps 99.5 % of the update, otherwise stochastic.
        seed: of the random bits.

    Raises:
        ConfigError: an unknown mode, or an invalid seed.
    """

    mode: Mode = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("rounding", self.mode, get_args(Mode))
        check_integer("the seed of the rounding", self.seed, 0, MAX_SEED)

    def first(self, dtype: torch.dtype) -> bool:
        """Whether sums are rounded stochastically without trying nearest."""
        return self.mode == "stochastic" and dtype in HALF

    def retries(self, dtype: torch.dtype, survived: float) -> bool:
        """Whether to round stochastically after nearest kept this share of an update."""
        return self.mode == "auto" and dtype in HALF and survived < KEPT


AUTO = Rounding()


def round_stochastically(
    total: Float[Tensor, "d h"], dtype: torch.dtype, seed: int, name: str, column: int
) -> Float[Tensor, "d h"]:
    """Round float32 numbers to bf16 or fp16 with random bits that depend on seed, tensor and position alone.

    Args:
        total: W + ΔW in some columns.
        dtype: of the result.
        seed: of the random bits.
        name: of the tensor.
        column: the first of the columns; positions are counted down the columns of W.
    """
    d, h = total.shape
    drawn = torch.from_numpy(rounding_bits(seed, name, column * d, d * h).astype("i4"))
    drawn = drawn.view(h, d).mT.to(total.device)
    if dtype == torch.bfloat16:  # the upper half of a float32: a carry from the lower half rounds it up
        bits = (total.view(torch.int32) + drawn) & -(1 << 16)
        return bits.view(torch.float32).to(dtype)
    limits = torch.finfo(dtype)
    power = (total.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = power.clamp_min(limits.smallest_normal) * limits.eps
    steps = total / step
    lower = steps.floor()
    up = (steps - lower) * 2.0**16 > drawn
    return ((lower + up) * step).to(dtype)
