"""The singular values and directions of scale·U·V, from the factors alone.

Does not form the d×h product: uses two thin QR decompositions and one SVD of an r×r core, in float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
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

    U = Q_u·R_u, Vᵀ = Q_v·R_v, then the SVD of the core scale·R_u·R_vᵀ. The Gram matrix would square the
    condition number and lose the small singular values.

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


def above_rounding(
    sigma: Float[Tensor, " k"], size: int, rounding: Float[Tensor, " k"] | None = None
) -> Bool[Tensor, " k"]:
    """Which singular values of a matrix are above the rounding of float64 and of the matrix's factors.

    Args:
        sigma: descending.
        size: the larger side of the matrix; the threshold is sigma₁·size·2⁻⁵².
        rounding: a second threshold for each singular value, such as `product_rounding`.

    >>> above_rounding(torch.tensor([2.0, 1.0, 1e-15]), 100).sum()
    tensor(2)
    """
    if not len(sigma):
        return sigma > 0
    floor = sigma[0] * size * torch.finfo(torch.float64).eps
    return sigma > (floor if rounding is None else rounding.clamp_min(floor))


def numerical_rank(sigma: Float[Tensor, " k"], size: int, rounding: Float[Tensor, " k"] | None = None) -> int:
    """The number of singular values above rounding; see `above_rounding`."""
    return int(above_rounding(sigma, size, rounding).sum())


def rounding_along(factor: Float[Tensor, "n r"], images: Float[Tensor, "r k"]) -> Float[Tensor, " k"]:
    """The expected ‖E·x‖ for each column x, where E is the rounding error of a factor in its dtype.

    The error of an entry is at most e = max(u·|entry|, η), with u half the dtype's epsilon (2⁻⁸ in bfloat16,
    2⁻¹¹ in float16) and η half its smallest number; a 0 is exact. With the norms D of the columns of the
    bounds, E = N·D and ‖E·x‖ ≤ ‖N‖·‖D·x‖. The entries of N are independent, of variance e²/(3D²), so that ‖N‖
    is at most about the sum of the norms of its largest column and its largest row, divided by √3 (Bandeira
    and van Handel, arXiv:1408.6185).
    """
    kind, sizes = torch.finfo(factor.dtype), factor.double().abs()
    bounds = (kind.eps / 2 * sizes).clamp_min(kind.smallest_normal * kind.eps / 2)
    bounds = torch.where(sizes > 0, bounds, 0)
    columns = torch.linalg.vector_norm(bounds, dim=0)
    row = torch.linalg.vector_norm(bounds / torch.where(columns > 0, columns, 1), dim=1).max()
    return (1 + row) / 3**0.5 * torch.linalg.vector_norm(columns[:, None] * images, dim=0)


def product_rounding(
    U: Float[Tensor, "d r"], V: Float[Tensor, "r h"], scale: float, parts: Svd
) -> Float[Tensor, " k"]:
    """The part of each singular value of scale·U·V that rounding of the stored factors can explain.

    The stored factors are U = U₀ + E and V = V₀ + F with rounding errors E and F. So σᵢ = scale·lᵢᵀ·U·V·rᵢ
    differs from the value of the exact product along the same pair, scale·lᵢᵀ·U₀·V₀·rᵢ, by
    scale·lᵢᵀ·(E·V + U₀·F)·rᵢ: at most |scale|·(‖E·(V·rᵢ)‖ + ‖Fᵀ·(Uᵀ·lᵢ)‖); `rounding_along` estimates each
    term. A smaller σᵢ may consist of rounding only. Each direction needs its own threshold: in factors that
    were truncated by an SVD each σᵢ has its own column, and its error is u·σᵢ even if σᵢ is small; in factors
    with more columns than the product's rank, the surplus singular values are about u·σ₁ or u²·σ₁.

    Each entry counts as rounded once. The error of a factor that was itself computed as a product in this
    dtype depends on that product's terms, which are not stored: where they cancel it is larger, and a surplus
    singular value can lie above its threshold.

    >>> U, V = torch.ones(4, 1).bfloat16(), torch.ones(1, 4).bfloat16()
    >>> 2**-8 < product_rounding(U, V, 1.0, svd(U, V)) / 4 < 2**-6
    tensor([True])
    """
    if not U.numel() or not V.numel():
        return torch.zeros_like(parts.sigma)
    left = rounding_along(U, V.double() @ parts.right.mT)
    return abs(scale) * (left + rounding_along(V.mT, U.double().mT @ parts.left))


def stable_rank(sigma: Float[Tensor, " k"]) -> float:
    """Σσ² / σ₁²: 1 if one direction has all the energy, k if all σ are equal, 0 if all are zero.

    >>> stable_rank(torch.tensor([4.0, 2.0, 1.0]))
    1.3125
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0.0
    return float((sigma / sigma[0]).double().square().sum())


def effective_rank(sigma: Float[Tensor, " k"]) -> float:
    """exp(H(σ/Σσ)) with the entropy H (Roy and Vetterli, EUSIPCO 2007); 0 if all singular values are zero.

    >>> round(effective_rank(torch.ones(3)), 6)
    3.0
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0.0
    share = sigma.double() / sigma.double().sum()
    return float(torch.special.entr(share).sum().exp())


def energy_rank(sigma: Float[Tensor, " k"], share: float) -> int:
    """The smallest k with Σ_{i≤k} σ² ≥ share · Σσ²; 0 if all singular values are zero.

    >>> energy_rank(torch.tensor([4.0, 2.0, 1.0]), 0.97)
    3
    """
    if not len(sigma) or float(sigma[0]) == 0:
        return 0
    energy = (sigma / sigma[0]).double().square().cumsum(0)
    enough = energy >= share * energy[-1] * (1 - 1e-12)  # tolerates rounding where the share is met exactly
    return int(torch.nonzero(enough)[0]) + 1
