"""U·V with the same bits for any number of threads, any blocks of columns, and any kind of processor.

A matrix product of a library adds in an order that depends on all of these. Here the factors are rounded so
that float64 holds every sum exactly, and then the order does not matter.
"""

import torch
from jaxtyping import Float
from torch import Tensor

RANKS = 32  # that are summed exactly; larger ranks are split into parts of this size
_BITS = 24  # of each factor: 24 + 24 + log2(RANKS) = 53, the integers that float64 holds


def reproducible_product(U: Float[Tensor, "d r"], V: Float[Tensor, "r h"]) -> Float[Tensor, "d h"]:
    """U·V in the dtype of U, as accurate as a product with sums in float32.

    Each row of U and each column of V is rounded to multiples of a power of two, 2⁻²⁴ of its largest entry.
    Float64 factors are not rounded, but summed one rank after the other.
    """
    if U.device.type == "mps":  # has no float64
        return U @ V
    if U.dtype == torch.float64 or not U.numel():
        total = U.new_zeros(U.shape[0], V.shape[1])
        for k in range(U.shape[1]):
            total += U[:, k, None] * V[k]
        return total
    total = _exact_product(U[:, :RANKS].double(), V[:RANKS].double())
    for k in range(RANKS, U.shape[1], RANKS):
        total += _exact_product(U[:, k : k + RANKS].double(), V[k : k + RANKS].double())
    return total.to(U.dtype)


def _exact_product(U: Tensor, V: Tensor) -> Tensor:
    sizes = _power_above(U, 0)  # balances the columns of U: a small column with a large row of V is not lost
    U, V = _rounded(U / sizes, 1), _rounded(V * sizes.mT, 0)
    return (V.mT @ U.mT).mT  # in the memory layout of W in linear layers


def _power_above(X: Tensor, dim: int) -> Tensor:
    """The least power of two above the largest absolute value along a dimension; 1 if all values are 0."""
    largest = X.abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, 1.0, largest / torch.frexp(largest).mantissa)


def _rounded(X: Tensor, dim: int) -> Tensor:
    """Round to multiples of 2⁻²⁴ of the power of two above the largest value along a dimension."""
    unit = _power_above(X, dim) * 2.0**-_BITS
    return (X / unit).round() * unit
