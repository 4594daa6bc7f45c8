"""Block Krylov iteration: the top singular directions of a large matrix from products with it.

Does not form the matrix if it is W + scale·U·V, and does not read files.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.spectra import Svd

NARROW = 16  # products with fewer columns are padded to this number
PASSES = 10  # maximum number of products with the matrix and its transpose
CHECKED = 2  # passes between two checks of convergence
TOLERANCE = 1e-4  # a triple has converged if ‖Wᵀ·left − sigma·right‖ is at most this share of sigma₁


@dataclass(frozen=True, eq=False)
class Shifted:
    """W + scale·U·V as an operator for products; U and V may be missing.

    Args:
        W: dense, float32 or float64.
        U: input factor in W's dtype.
        V: output factor in W's dtype.
        scale: the factor of U·V.
    """

    W: Float[Tensor, "d h"]
    U: Float[Tensor, "d r"] | None = None
    V: Float[Tensor, "r h"] | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(d, h)."""
        return self.W.shape[0], self.W.shape[1]

    def times(self, X: Float[Tensor, "h k"]) -> Float[Tensor, "d k"]:
        """(W + scale·U·V)·X."""
        product = multiply(self.W, X)
        if self.U is None or self.V is None:
            return product
        return product.addmm_(self.U, self.V @ X, alpha=self.scale)

    def transposed_times(self, X: Float[Tensor, "d k"]) -> Float[Tensor, "h k"]:
        """(W + scale·U·V)ᵀ·X."""
        product = multiply(self.W.mT, X)
        if self.U is None or self.V is None:
            return product
        return product.addmm_(self.V.mT, self.U.mT @ X, alpha=self.scale)


def multiply(W: Float[Tensor, "d h"], X: Float[Tensor, "h k"]) -> Float[Tensor, "d k"]:
    """W·X for a few columns.

    For 2 to 11 columns, and a W that is stored as its transpose, torch's BLAS library takes up to forty times
    as long as for 16 columns. From 2 to 15 columns, X is therefore padded with columns of zeros.
    """
    k = X.shape[1]
    return W @ X if k < 2 or k >= NARROW else (W @ torch.nn.functional.pad(X, (0, NARROW - k)))[:, :k]


@dataclass(frozen=True, eq=False)
class TopSvd:
    """The leading singular triples of a matrix, with bounds of their error.

    Args:
        left: input directions, in columns.
        sigma: descending.
        right: output directions, in rows.
        residual: ‖Wᵀ·left_i − sigma_i·right_i‖ of each triple; a singular value lies at most this far from
            sigma_i.
        gap: distance of each sigma to the nearest other singular value in the space, or to 0.
    """

    left: Float[Tensor, "d k"]
    sigma: Float[Tensor, " k"]
    right: Float[Tensor, "k h"]
    residual: Float[Tensor, " k"]
    gap: Float[Tensor, " k"]

    @property
    def mT(self) -> "TopSvd":
        """The triples of the transposed matrix."""
        return TopSvd(self.right.mT, self.sigma, self.left.mT, self.residual, self.gap)


class KrylovSpace:
    """A growing orthonormal basis of output directions, together with W·basis and Wᵀ·W·basis.

    Each block needs one product with W and one with Wᵀ; later queries of the space need none.

    Args:
        matrix: the matrix of the products.
    """

    def __init__(self, matrix: Shifted) -> None:
        d, h = matrix.shape
        self.matrix = matrix
        self.basis, self.images, self.backs = (matrix.W.new_empty(n, 0) for n in (h, d, h))
        self.gram = matrix.W.new_empty(0, 0, dtype=torch.float64)  # imagesᵀ·images

    @property
    def size(self) -> int:
        """The number of directions in the basis."""
        return self.basis.shape[1]

    def extend(self, block: Float[Tensor, "h n"]) -> Float[Tensor, "h m"]:
        """Add the part of a block that is orthogonal to the basis; returns Wᵀ·W·(that part) as next block."""
        block = _orthonormal(block, self.basis)
        if not block.shape[1]:
            return block
        image = self.matrix.times(block)
        back = self.matrix.transposed_times(image)
        old, new = self.images.double(), image.double()
        corner = old.mT @ new
        self.gram = torch.cat(
            [torch.cat([self.gram, corner], dim=1), torch.cat([corner.mT, new.mT @ new], dim=1)]
        )
        self.basis = torch.cat([self.basis, block], dim=1)
        self.images = torch.cat([self.images, image], dim=1)
        self.backs = torch.cat([self.backs, back], dim=1)
        return back

    def sigmas(self) -> Float[Tensor, " m"]:
        """All singular values within the space, descending, in float64."""
        return torch.linalg.eigvalsh(self.gram).clamp_min(0).sqrt().flip(0)

    def top(self, k: int) -> Float[Tensor, "m k"]:
        """The k strongest directions within the space (Ritz vectors), in coordinates of the basis."""
        return torch.linalg.eigh(self.gram).eigenvectors.flip(1)[:, :k].to(self.basis)

    def residuals(self, top: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
        """‖Wᵀ·left_i − sigma_i·right_i‖ of each direction, up to rounding."""
        sigma = torch.linalg.vector_norm(self.images @ top, dim=0).clamp_min(torch.finfo(top.dtype).tiny)
        return torch.linalg.vector_norm(self.backs @ (top / sigma) - self.basis @ (top * sigma), dim=0)


def top_svd(
    matrix: Shifted, k: int, *, generator: torch.Generator | None = None, passes: int = PASSES
) -> TopSvd:
    """The k leading singular triples, from the space of Ω, (WᵀW)Ω, …, (WᵀW)^q·Ω.

    Source: Musco and Musco (arXiv:1504.05477), with full reorthogonalisation; written for W (d×h), so the
    space is on the output side. The iteration ends if every residual is at most 1e-4·sigma₁, if the space is
    complete (then the result is exact), or after `passes`. It runs in W's dtype, with the small matrices in
    float64.

    Args:
        matrix: W, or W + scale·U·V.
        k: the number of triples; at most min(d, h) are returned.
        generator: for the Gaussian start, on the CPU; seed 0 by default.
        passes: the maximum number of blocks.

    >>> top = top_svd(Shifted(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), 2)
    >>> [round(x, 4) for x in top.sigma.tolist()]
    [3.0, 2.0]
    """
    d, h = matrix.shape
    k = min(k, d, h)
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(d, min(k + 8, d, h), generator=generator, dtype=torch.float64)
    block = matrix.transposed_times(start.to(matrix.W))
    space = KrylovSpace(matrix)
    for number in range(1, passes + 1):
        before = space.size
        block = space.extend(block)
        if space.size == before or space.size >= min(d, h):
            break
        if number % CHECKED == 0 and number < passes:
            top = space.top(k)
            strongest = float(torch.linalg.vector_norm(space.images @ top[:, 0]))
            if float(space.residuals(top).max()) <= TOLERANCE * strongest:
                break
    return _triples(space, space.top(k)) if space.size else _zero_triples(matrix, k)


def _triples(space: KrylovSpace, top: Float[Tensor, "m k"]) -> TopSvd:
    """Singular triples from directions within a space; their residuals come from new products."""
    q, core = torch.linalg.qr(space.images @ top)
    left, sigma, right = torch.linalg.svd(core, full_matrices=False)
    left, right = q @ left, ((space.basis @ top) @ right.mT).mT
    residual = torch.linalg.vector_norm(space.matrix.transposed_times(left) - right.mT * sigma, dim=0)
    return TopSvd(left, sigma, right, residual, gaps(space.sigmas())[: len(sigma)].to(sigma))


def _orthonormal(block: Float[Tensor, "h k"], space: Float[Tensor, "h m"]) -> Float[Tensor, "h n"]:
    """An orthonormal basis of the part of the block that is outside the space; it may have fewer columns."""
    if not block.shape[1]:
        return block
    block = block / block.abs().max().clamp_min(torch.finfo(block.dtype).tiny)  # squares must not overflow
    before = torch.linalg.vector_norm(block, dim=0)
    room = min(block.shape[0] - space.shape[1], block.shape[1])
    for _ in range(2):
        block = block - space @ (space.mT @ block)
    eps = torch.finfo(block.dtype).eps
    left, sigma, _ = torch.linalg.svd(block, full_matrices=False)
    new = left[:, :room][:, (sigma > 50 * eps * before.max())[:room]]
    new = new - space @ (space.mT @ new)
    return torch.linalg.qr(new).Q


def _zero_triples(matrix: Shifted, k: int) -> TopSvd:
    """Triples of a zero matrix."""
    d, h = matrix.shape
    zeros = matrix.W.new_zeros(k)
    eye = [torch.eye(n, k, dtype=matrix.W.dtype, device=matrix.W.device) for n in (d, h)]
    return TopSvd(eye[0], zeros, eye[1].mT, zeros, zeros)


def gaps(sigma: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The distance of each of some descending values to its nearest neighbour; the last one's may be 0."""
    below = sigma - torch.cat([sigma[1:], sigma.new_zeros(1)])
    return torch.cat([below[:1], torch.minimum(below[1:], below[:-1])])


def angles(residual: Float[Tensor, " k"], gap: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Upper bounds, in radians and float64, of the angle between computed and true singular vectors.

    Source: the sin θ theorem of Davis and Kahan, for the symmetric matrix with the blocks W and Wᵀ: the sine
    is at most residual/gap. Without a gap, a vector is an arbitrary mixture of several, and the bound is π/2.
    """
    share = residual.double() / gap.double().clamp_min(torch.finfo(torch.float64).tiny)
    return share.clamp_max(1).asin()


def dense_svd(W: Float[Tensor, "d h"]) -> Svd:
    """The thin SVD of a dense matrix in float64; O(d·h·min(d, h)), so only for small matrices."""
    return Svd(*torch.linalg.svd(W.double(), full_matrices=False))


def frobenius(W: Float[Tensor, "d h"]) -> float:
    """‖W‖_F of a dense matrix in any float dtype, summed in float64 over blocks of rows."""
    rows = W if W.stride(-1) == 1 else W.mT  # rows that are contiguous in memory
    step = max(1, 2**17 // max(1, rows.shape[1]))  # the float64 copy of a block fits into the cache
    buffer = torch.empty(step, rows.shape[1], dtype=torch.float64, device=W.device)
    total = 0.0
    for part in rows.split(step) if W.numel() else ():
        copied = buffer[: len(part)].copy_(part).view(-1)
        total += float(copied @ copied)
    return total**0.5
