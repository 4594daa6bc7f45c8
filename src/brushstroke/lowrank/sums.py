"""The strongest directions of W + U·V, from W's own and those of U·V.

The sum is never formed, and all products are with W alone, so that the space serves questions about W too.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.krylov import TOLERANCE, KrylovSpace, Shifted, TopSvd, multiply
from brushstroke.lowrank.spectra import Svd

PASSES = 10  # blocks, at most
_SPARE = 6  # directions of W that the space grows from, beyond as many as are asked for
_WIDEST = 16  # directions of the update that the space grows from
_FASTER = 1.5  # Krylov spaces converge faster and faster: what is left is judged as so many more passes


@dataclass(frozen=True, eq=False)
class SumTop:
    """The leading singular triples of W + ΔW, and the space in which they were found.

    Args:
        top: the triples; their residuals are of W + ΔW.
        back: Wᵀ·left.
        space: the directions that were tried, with their products with WᵀW.
    """

    top: TopSvd
    back: Float[Tensor, "h k"]
    space: KrylovSpace

    @property
    def settled(self) -> Tensor:
        """Which of the triples have converged."""
        return self.top.residual <= TOLERANCE * self.top.sigma[0]


def top_of_sum(
    W: Float[Tensor, "d h"], update: Svd, known: Float[Tensor, "h m"], k: int, passes: int = PASSES
) -> SumTop:
    """The k leading singular triples of M = W + ΔW with ΔW = left·diag(sigma)·right.

    The space is the Krylov space of MᵀM from the strongest directions of W, from `right` and from Wᵀ·left:
    the result is near their span. As MᵀM·x = WᵀW·x + Wᵀ·left·(…) + rightᵀ·(…), a block takes one product with
    W and one with Wᵀ, and it is the Krylov space of WᵀW too, up to directions of an update of many. It ends
    where every residual is below 1e-4·sigma₁, or will not be in the passes that are left.

    Args:
        W: float32 or float64.
        update: of any rank.
        known: strongest output directions of W, in columns.
        k: how many.
        passes: the largest number of blocks.
    """
    k = min(k, *W.shape)
    U, V = update.left.to(W), (update.sigma[:, None] * update.right).to(W)
    space, pulled = KrylovSpace(Shifted(W)), multiply(W.mT, U)
    sizes = torch.linalg.vector_norm(pulled, dim=0)
    unit = (pulled / torch.where(sizes > 0, sizes, 1))[:, :_WIDEST]
    block = torch.cat([known[:, : k + _SPARE].to(W), update.right[:_WIDEST].mT.to(W), unit], dim=1)
    before: Tensor | None = None
    while True:
        size, passes = space.size, passes - 1
        back = space.extend(block)
        found = _triples(space, U, V, pulled, k)
        if space.size in (size, W.shape[1]) or not _hopeful(found.top, before, passes):
            return found
        before = found.top.residual
        inner = V @ space.basis[:, size:]
        block = back + pulled @ inner + V.mT @ (U.mT @ space.images[:, size:] + inner)


def _hopeful(top: TopSvd, before: Tensor | None, passes: int) -> bool:
    """Whether a triple that has not converged can do so in the passes that are left, at its pace."""
    wanted = TOLERANCE * top.sigma[0]
    unsettled = top.residual > wanted
    if before is None or passes < 1:
        return bool(unsettled.any()) and passes > 0
    pace = (top.residual / before.clamp_min(torch.finfo(before.dtype).tiny)).clamp_max(1)
    return bool((unsettled & (top.residual * pace ** (_FASTER * passes) <= wanted)).any())


def _triples(
    space: KrylovSpace, U: Float[Tensor, "d r"], V: Float[Tensor, "r h"], pulled: Float[Tensor, "h r"], k: int
) -> SumTop:
    inner = V @ space.basis
    cross = (space.basis.mT @ pulled).double() @ inner.double()  # imagesᵀ·U·V·basis
    gram = space.gram + cross + cross.mT + inner.double().mT @ inner.double()
    chosen = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :k].to(U)
    q, core = torch.linalg.qr(space.images @ chosen + U @ (inner @ chosen))
    turn, sigma, mixed = torch.linalg.svd(core, full_matrices=False)
    chosen, left = chosen @ mixed.mT, q @ turn
    right = space.basis @ chosen
    back = (space.backs @ chosen + pulled @ (inner @ chosen)) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    gap = back + V.mT @ (U.mT @ left) - right * sigma
    top = TopSvd(left, sigma, right.mT, torch.linalg.vector_norm(gap, dim=0))
    return SumTop(top, back, space)
