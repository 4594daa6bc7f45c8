"""The strongest directions of W + U·V, from the directions of W and of U·V.

Does not form the sum: all products are with W alone, so that the space can also answer queries about W.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.krylov import TOLERANCE, KrylovSpace, Shifted, TopSvd, gaps, multiply
from brushstroke.lowrank.spectra import Svd

PASSES = 10  # maximum number of blocks
_SPARE = 6  # the space starts from this many directions of W more than are requested
_WIDEST = 16  # the space starts from at most this many directions of the update
_FASTER = 1.5  # convergence accelerates: each remaining pass counts as this many passes at the current pace


@dataclass(frozen=True, eq=False)
class SumTop:
    """The leading singular triples of W + ΔW, and the space in which they were found.

    Args:
        top: the triples; their residuals are with respect to W + ΔW.
        back: Wᵀ·left.
        space: the basis, with its products with WᵀW.
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

    The space is the Krylov space of MᵀM that starts from the strongest directions of W, from `right` and from
    Wᵀ·left: the result is near their span. Because MᵀM·x = WᵀW·x + Wᵀ·left·(…) + rightᵀ·(…), a block needs
    one product with W and one with Wᵀ, and the space is also the Krylov space of WᵀW, except for directions
    of an update of high rank. The iteration ends if every residual is at most 1e-4·sigma₁, or if no further
    one can reach that in the remaining passes.

    Args:
        W: float32 or float64.
        update: of any rank.
        known: strongest output directions of W, in columns.
        k: the number of triples.
        passes: the maximum number of blocks.
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
        if space.size in (size, W.shape[1]) or not _can_converge(found.top, before, passes):
            return found
        before = found.top.residual
        inner = V @ space.basis[:, size:]
        block = back + pulled @ inner + V.mT @ (U.mT @ space.images[:, size:] + inner)


def _can_converge(top: TopSvd, before: Tensor | None, passes: int) -> bool:
    """Whether, at its current pace, any unconverged triple can converge in the remaining passes."""
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
    values, vectors = torch.linalg.eigh(gram)
    chosen = vectors.flip(1)[:, :k].to(U)
    q, core = torch.linalg.qr(space.images @ chosen + U @ (inner @ chosen))
    rotation, sigma, mixed = torch.linalg.svd(core, full_matrices=False)
    chosen, left = chosen @ mixed.mT, q @ rotation
    right = space.basis @ chosen
    back = (space.backs @ chosen + pulled @ (inner @ chosen)) / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
    residual = torch.linalg.vector_norm(back + V.mT @ (U.mT @ left) - right * sigma, dim=0)
    gap = gaps(values.clamp_min(0).sqrt().flip(0))[: len(sigma)]
    top = TopSvd(left, sigma, right.mT, residual, gap.to(sigma))
    return SumTop(top, back, space)
