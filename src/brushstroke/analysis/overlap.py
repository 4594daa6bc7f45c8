"""The overlap of two sets of orthonormal directions, for all leading subsets, and its chance level.

Does not compute directions of updates (`subspace` does); these are pure functions on directions.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def overlap_grid(first: Float[Tensor, "n i"], second: Float[Tensor, "n j"]) -> Float[Tensor, "i j"]:
    """φ(i, j) = ‖firstᵢᵀ·secondⱼ‖_F² / min(i, j) for the leading i and j columns; entry [i−1, j−1].

    One product and two cumulative sums (arXiv:2106.09685, eq. 4). φ is the mean squared cosine of the
    principal angles, 1 − D²/min(i, j) with the projection metric D (appendix G of the paper has a misprint).

    Args:
        first: orthonormal columns.
        second: orthonormal columns.

    >>> overlap_grid(torch.eye(3, 2), torch.eye(3, 1))
    tensor([[1.],
            [1.]])
    """
    squares = (first.mT @ second).square()
    return squares.cumsum(0).cumsum(1) / _smaller(squares.shape[0], squares.shape[1], squares)


def chance(i: int, j: int, n: int) -> Float[Tensor, "i j"]:
    """E φ = max(i, j)/n for independent uniformly random subspaces of R^n."""
    rows, columns = torch.arange(1, i + 1.0).double(), torch.arange(1, j + 1.0).double()
    return torch.maximum(rows[:, None], columns) / n


def chance_deviation(i: int, j: int, n: int) -> Float[Tensor, "i j"]:
    """The standard deviation of φ for independent uniformly random subspaces of R^n.

    Var‖XᵀY‖² = 2ij(n − i)(n − j) / (n²(n − 1)(n + 2)) for Haar-random X (n×i), Y (n×j).
    """
    rows, columns = torch.arange(1, i + 1.0).double()[:, None], torch.arange(1, j + 1.0).double()
    variance = 2 * rows * columns * (n - rows) * (n - columns) / (n**2 * max(n - 1, 1) * (n + 2))
    return variance.clamp_min(0).sqrt() / torch.minimum(rows, columns)


def z_scores(grid: Float[Tensor, "i j"], n: int) -> Float[Tensor, "i j"]:
    """(φ − E φ) in standard deviations; 0 if a subspace is the whole space, so that φ is constant."""
    i, j = grid.shape
    deviation = chance_deviation(i, j, n)
    gap = grid - chance(i, j, n)
    return torch.where(deviation > 0, gap / deviation.clamp_min(1e-300), 0.0)


def weighted_overlap(
    first: Float[Tensor, "n i"],
    first_sigma: Float[Tensor, " i"],
    second: Float[Tensor, "n j"],
    second_sigma: Float[Tensor, " j"],
) -> float:
    """Σ σ₁ᵢ²·σ₂ⱼ²·(firstᵢ·secondⱼ)² / (‖σ₁²‖·‖σ₂²‖): the cosine of the matrices Σσ²·x·xᵀ of the two sets.

    It does not depend on single directions, so it is stable if two singular values are nearly equal and their
    directions change places.
    """
    one, two = first_sigma.square(), second_sigma.square()
    size = float(one.norm() * two.norm())
    return float(one @ (first.mT @ second).square() @ two) / size if size else 0.0


def weighted_chance(first_sigma: Float[Tensor, " i"], second_sigma: Float[Tensor, " j"], n: int) -> float:
    """The mean of `weighted_overlap` for random directions in R^n."""
    one, two = first_sigma.square(), second_sigma.square()
    size = float(one.norm() * two.norm())
    return float(one.sum() * two.sum()) / (n * size) if size else 0.0


def random_directions(n: int, k: int, generator: torch.Generator) -> Float[Tensor, "n k"]:
    """k orthonormal directions, uniformly random in R^n, float64."""
    q, r = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _smaller(i: int, j: int, like: Tensor) -> Float[Tensor, "i j"]:
    rows, columns = (torch.arange(1, size + 1, device=like.device).to(like.dtype) for size in (i, j))
    return torch.minimum(rows[:, None], columns)
