"""The singular values and directions of scale·U·V, from the factors alone.

It never forms the d×h product: two thin QR decompositions and one SVD of an r×r core, in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Svd(NamedTuple):
    """ΔW = left · diag(sigma) · right, sigma descending; float64.

    `left` (d×k) holds input directions in its columns, `right` (k×h) output directions in its rows.
    """

    left: Float[Tensor, "d k"]
    sigma: Float[Tensor, " k"]
    right: Float[Tensor, "k h"]


def svd(U: Float[Tensor, "d r"], V: Float[Tensor, "r h"], scale: float = 1.0) -> Svd:
    """The thin SVD of scale·U·V with k = min(r, d, h), in O((d + h)·r² + r³).

    U = Q_u·R_u, Vᵀ = Q_v·R_v, then the SVD of the core scale·R_u·R_vᵀ. The route over the Gram matrix
    would square the condition number and lose the small singular values.

    >>> U, V = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]])
    >>> svd(U, V).sigma
    tensor([10.], dtype=torch.float64)
    """
    q_u, r_u = torch.linalg.qr(U.double())
    q_v, r_v = torch.linalg.qr(V.double().mT)
    left, sigma, right = torch.linalg.svd(scale * (r_u @ r_v.mT), full_matrices=False)
    return Svd(q_u @ left, sigma, right @ q_v.mT)


def singular_values(
    U: Float[Tensor, "d r"], V: Float[Tensor, "r h"], scale: float = 1.0
) -> Float[Tensor, " k"]:
    """The singular values of scale·U·V, descending, in float64, without the directions."""
    r_u = torch.linalg.qr(U.double(), mode="r").R
    r_v = torch.linalg.qr(V.double().mT, mode="r").R
    return torch.linalg.svdvals(scale * (r_u @ r_v.mT))


def numerical_rank(sigma: Float[Tensor, " k"], size: int) -> int:
    """How many singular values of a matrix stand above the rounding of float64.

    Args:
        sigma: descending.
        size: the larger side of the matrix; the threshold is sigma₁·size·2⁻⁵².

    >>> numerical_rank(torch.tensor([2.0, 1.0, 1e-15]), 100)
    2
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0
    return int((sigma > sigma[0] * size * torch.finfo(torch.float64).eps).sum())


def stable_rank(sigma: Float[Tensor, " k"]) -> float:
    """Σσ² / σ₁²: 1 where one direction holds all the energy, k where all are equal; 0 of nothing.

    >>> stable_rank(torch.tensor([4.0, 2.0, 1.0]))
    1.3125
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0.0
    return float((sigma / sigma[0]).double().square().sum())


def effective_rank(sigma: Float[Tensor, " k"]) -> float:
    """exp(H(σ/Σσ)), the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007); 0 of nothing.

    >>> round(effective_rank(torch.ones(3)), 6)
    3.0
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0.0
    share = sigma.double() / sigma.double().sum()
    return float(torch.special.entr(share).sum().exp())


def energy_rank(sigma: Float[Tensor, " k"], share: float) -> int:
    """The smallest k with Σ_{i≤k} σ² ≥ share · Σσ²; 0 of nothing.

    >>> energy_rank(torch.tensor([4.0, 2.0, 1.0]), 0.97)
    3
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0
    energy = (sigma / sigma[0]).double().square().cumsum(0)
    enough = energy >= share * energy[-1] * (1 - 1e-12)  # a share that is met exactly is met
    return int(torch.nonzero(enough)[0]) + 1
