"""Initial values of U; V starts at zero, so that a fresh adapter does not change the model.

Does not create updates (`layers` does). Each rule is one function in `INITS`; add a rule there.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Init = Callable[[int, int, torch.Generator], Float[Tensor, "r d"]]


def kaiming(d: int, rank: int, generator: torch.Generator) -> Float[Tensor, "r d"]:
    """Uᵀ uniform in ±1/√d: kaiming-uniform with a = √5, as in the LoRA authors' loralib."""
    bound = 1.0 / math.sqrt(d)
    return torch.empty(rank, d).uniform_(-bound, bound, generator=generator)


def gaussian(d: int, rank: int, generator: torch.Generator) -> Float[Tensor, "r d"]:
    """Uᵀ normal with variance 1/d, as described in arXiv:2106.09685, section 4.1."""
    return torch.empty(rank, d).normal_(std=1.0 / math.sqrt(d), generator=generator)


INITS: dict[str, Init] = {"kaiming": kaiming, "gaussian": gaussian}
