"""How much of a direction can lie on one singular vector of a large matrix: an upper bound without its SVD.

It finds no singular vector. The bound is the Christoffel function of the direction's spectral measure.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 32
FLOOR = 0.05  # of sigma₁: on a wide W, singular vectors below it are not covered
NEAR = 1e-5  # of σ₁²: Ritz values of float32 products are that near to the eigenvalues they stand for
_POINTS = 24  # evaluations of the bound between two Ritz values, before zooming in
_ZOOMS = 4


@dataclass(frozen=True, eq=False)
class _Measure:
    """The Lanczos coefficients of a direction: the diagonal and the side of a tridiagonal matrix, float64."""

    alpha: Float[Tensor, " m"]
    beta: Float[Tensor, " m-1"]

    def gauss(self) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
        """The Ritz values and their weights: there 1/Σp² is the weight."""
        values, vectors = torch.linalg.eigh(
            torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)
        )
        return values, vectors[0].square()

    def bound(self, x: Float[Tensor, " n"], near: float) -> Float[Tensor, " n"]:
        """1/Σp(x)²; within `near` of a Ritz value at least its weight.

        A singular vector that holds nearly all of the direction makes a peak too narrow for the recurrence.
        """
        values, weights = self.gauss()
        at_nodes = torch.where((x[:, None] - values).abs() <= near, weights, 0).max(dim=1).values
        return torch.maximum(1 / self.squares(x), at_nodes)

    def squares(self, x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Σ_j p_j(x)² of the orthonormal polynomials, by the three-term recurrence."""
        before, now = torch.zeros_like(x), torch.ones_like(x)
        total = now.clone()
        for j in range(len(self.beta)):
            shifted = (x - self.alpha[j]) * now - (self.beta[j - 1] * before if j else 0)
            before, now = now, shifted / self.beta[j]
            total = total + now.square()
        return total


def largest_cosine_bound(
    W: Float[Tensor, "d h"], directions: Float[Tensor, "k h"], steps: int = STEPS
) -> tuple[list[float], float]:
    """For each direction q an upper bound of max_i |⟨q_i, q⟩| over the right singular vectors q_i of W (d×h).

    Lanczos on WᵀW from q gives the orthonormal polynomials p of its spectral measure; the mass at any point x
    is at most 1/Σp_j(x)². Where h > d, WᵀW has a null space whose directions are no singular vectors, and q
    may lie in it; there the measure of W·q under WWᵀ, which has no such mass, is used beside it.

    Args:
        W: float32 or float64.
        directions: unit vectors in rows.
        steps: products with W and Wᵀ.

    Returns:
        The bounds, and the share of sigma₁ above which the singular vectors are covered (0 where d ≥ h).
    """
    d, h = W.shape
    q = directions.mT.to(W.dtype)
    plain = _measures(lambda X: W.mT @ (W @ X), q, steps)
    if h <= d:
        return [_mass_bound(measure, None, 1.0, 0.0) ** 0.5 for measure in plain], 0.0
    image = W @ q
    sizes = torch.linalg.vector_norm(image.double(), dim=0).square().tolist()
    imaged = _measures(lambda X: W @ (W.mT @ X), image, steps)
    top = max((float(m.gauss()[0][-1]) for m in (*plain, *imaged) if len(m.alpha)), default=0.0)
    lowest = FLOOR**2 * top
    triples = zip(plain, imaged, sizes, strict=True)
    return [_mass_bound(one, two, size, lowest) ** 0.5 for one, two, size in triples], FLOOR


def _measures(product: Callable[[Tensor], Tensor], start: Float[Tensor, "n k"], steps: int) -> list[_Measure]:
    """The Lanczos coefficients of each column, with full reorthogonalisation.

    A column ends early where its Krylov space is exhausted.
    """
    n, k = start.shape
    steps = min(steps, n)
    size = torch.linalg.vector_norm(start, dim=0)
    basis = start.new_zeros(steps, n, k)
    basis[0] = start / torch.where(size > 0, size, 1)
    alphas = torch.zeros(steps, k, dtype=torch.float64)
    betas = torch.zeros(steps, k, dtype=torch.float64)
    for step in range(steps):
        image = product(basis[step])
        alphas[step] = (basis[step] * image).sum(0).double()
        for _ in range(2):
            shares = torch.einsum("snk,nk->sk", basis[: step + 1], image)
            image = image - torch.einsum("snk,sk->nk", basis[: step + 1], shares)
        beta = torch.linalg.vector_norm(image, dim=0)
        betas[step] = beta.double()
        if step + 1 < steps:
            basis[step + 1] = image / torch.where(beta > 0, beta, 1)
    floor = 10 * torch.finfo(start.dtype).eps * float(alphas.abs().max()) if steps else 0.0
    found = []
    for column in range(k):
        ended = torch.nonzero(betas[:, column] <= floor)
        length = int(ended[0]) + 1 if len(ended) else steps
        length = 0 if float(size[column]) == 0 else length
        found.append(_Measure(alphas[:length, column], betas[: max(length - 1, 0), column]))
    return found


def _mass_bound(plain: _Measure, imaged: _Measure | None, weight: float, lowest: float) -> float:
    """The largest mass of a single point x ≥ lowest: by the first measure, or weight/x of the second one."""
    measures = [measure for measure in (plain, imaged) if measure is not None]
    if not all(len(measure.alpha) for measure in measures):
        return 0.0
    nodes = torch.cat([measure.gauss()[0] for measure in measures])
    near = NEAR * float(nodes.abs().max())
    ends = torch.tensor([lowest, max(lowest, float(nodes.max()))], dtype=torch.float64)
    nodes = torch.cat([nodes[nodes > lowest], ends]).sort().values
    inner = torch.linspace(0, 1, _POINTS, dtype=torch.float64)
    points = torch.cat([(nodes[:-1, None] + nodes.diff()[:, None] * inner).reshape(-1), nodes])
    best = 0.0
    for _ in range(_ZOOMS):
        points = points.sort().values
        values = plain.bound(points, near)
        if imaged is not None:
            values = torch.minimum(values, weight / points.clamp_min(1e-300) * imaged.bound(points, near))
        best = max(best, float(values.max()))
        peaks = values.topk(min(8, len(values))).indices
        lower, upper = points[(peaks - 1).clamp_min(0)], points[(peaks + 1).clamp_max(len(points) - 1)]
        points = (lower[:, None] + (upper - lower)[:, None] * inner).reshape(-1)
    return min(best, 1.0)
