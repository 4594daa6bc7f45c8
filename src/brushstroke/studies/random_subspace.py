"""Training in a random subspace: θ = θ₀ + P·z, where only z (k values) is trained.

Does not choose dimensions (`intrinsic` does). Source: Li et al. 2018 (arXiv:1804.08838), whose P has
normalised Gaussian columns. If that P would be too large, each parameter is assigned to one coordinate of z
with a random sign, as in hashing; these columns are also normalised, and exactly orthogonal.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DENSE_NUMBERS = 2**26  # maximum number of values of a dense Gaussian P: 256 MiB in float32


class SubspaceAdamW:
    """An optimiser of z that writes θ₀ + P·z into the parameters; has the methods of AdamW.

    Args:
        parameters: θ, with D values in total.
        dimension: k, of z; from 1 to D.
        learning_rate: of AdamW on z.
        seed: of P.
    """

    def __init__(self, parameters: Sequence[Tensor], dimension: int, learning_rate: float, seed: int) -> None:
        self._parameters = list(parameters)
        total = sum(parameter.numel() for parameter in parameters)
        first = self._parameters[0]
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self._projection = _projection(total, dimension, seed, first)
        self.z = torch.zeros(dimension, device=first.device, dtype=first.dtype)
        self._adam = torch.optim.AdamW([self.z], learning_rate, weight_decay=0.0)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's parameter groups, so that a schedule can set the learning rate."""
        return self._adam.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Project the gradient, step on z, and write the parameters."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self.z.grad = self._projection.pull(torch.cat([g.flatten() for g in gradients]))
        self._adam.step()
        moved = self._projection.push(self.z)
        place = 0
        for parameter, start in zip(self._parameters, self._start, strict=True):
            part = moved[place : place + parameter.numel()].view_as(parameter)
            parameter.copy_(start + part)
            place += parameter.numel()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for parameter in self._parameters:
            parameter.grad = None


class _Gaussian:
    """P (D×k) as a dense matrix with normalised columns."""

    def __init__(self, total: int, dimension: int, seed: int, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(seed)
        P = torch.randn(total, dimension, generator=generator)
        self._P = (P / P.norm(dim=0)).to(like.device, like.dtype)

    def pull(self, gradient: Tensor) -> Tensor:
        return self._P.mT @ gradient

    def push(self, z: Tensor) -> Tensor:
        return self._P @ z


class _Hashed:
    """One entry ±1/√n in each row of P; n is the number of parameters that share the coordinate."""

    def __init__(self, total: int, dimension: int, seed: int, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(seed)
        index = torch.arange(total).remainder(dimension)[torch.randperm(total, generator=generator)]
        sign = torch.randint(0, 2, (total,), generator=generator).mul(2).sub(1)
        size = torch.bincount(index, minlength=dimension).to(like.dtype).rsqrt()
        self._index = index.to(like.device)
        self._weight = (sign * size[index]).to(like.device, like.dtype)
        self._dimension = dimension

    def pull(self, gradient: Tensor) -> Tensor:
        z = torch.zeros(self._dimension, device=gradient.device, dtype=gradient.dtype)
        return z.index_add_(0, self._index, gradient * self._weight)

    def push(self, z: Tensor) -> Tensor:
        return z[self._index] * self._weight


def _projection(total: int, dimension: int, seed: int, like: Tensor) -> _Gaussian | _Hashed:
    kind = _Gaussian if total * dimension <= DENSE_NUMBERS else _Hashed
    return kind(total, dimension, seed, like)
