"""Upper bounds of the cosine between a direction and any singular vector of a large matrix, without its SVD.

Does not find singular vectors. Each is orthogonal to the range of WᵀW − σ², so the distance of a direction
from that range bounds its cosine.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.krylov import KrylovSpace

FLOOR = 0.05  # share of σ₁: if W has a null space, smaller singular values take longer to cover
_NOISE = 1e-5  # share of σ₁² above the error of a float32 product WᵀW·x; a float64 Cholesky factor exists
_ABOVE = 1.1  # multiple of the largest eigenvalue within the space; W has no eigenvalue above it
_STRONGEST, _DEGREE = 16, 24  # in a large space: strongest directions, and Krylov steps, of a problem
_ZERO = 1e-10  # after projection, a vector shorter than this share of its length is rounding
_PARTS = 32  # number of eigenvalue intervals at the start
_ROUNDS, _WORST, _SPLIT = 6, 4, 4  # rounds; intervals that a round splits; parts of a split interval
_ROWS = 1024  # rows of WWᵀ computed at a time; only the lower triangle is needed


class CosineBounds(NamedTuple):
    """Upper bounds of the largest |cosine| of some directions with any singular vector of W.

    Args:
        values: one for each direction.
        left_over: for each direction the residual at its worst λ; a space extended by these residuals gives
            lower bounds.
    """

    values: Float[Tensor, " k"]
    left_over: Float[Tensor, "h k"]


def cosine_bounds(
    space: KrylovSpace,
    directions: Float[Tensor, "h k"],
    floor: float = 0.0,
    *,
    of_images: bool = False,
    enough: float = 0.0,
) -> CosineBounds:
    """Upper bounds of max_i |⟨q_i, z⟩| over the right singular vectors q_i of W (d×h), for each z.

    With WᵀW·q_i = λ·q_i, q_i is orthogonal to (WᵀW − λ)·y for every y. So |⟨q_i, z⟩| ≤ ‖z − (WᵀW − λ)·Y·a‖
    for an orthonormal Y and any a. One a is valid for all λ within η of c: there the norm is at most
    ‖z − (WᵀW − c)·Y·a‖ + η·‖a‖, and an error of at most ν in the computed WᵀW·Y adds ν·‖a‖. A good a
    minimises the sum of the squares, which is a small least squares problem if WᵀW·Y is known. Intervals
    cover all λ, and the worst intervals are split. If Y is the Krylov space of z, the bound is its
    Christoffel function; further directions in Y, such as W's strongest ones, can only improve it.

    Args:
        space: Y, with WᵀW·Y; its largest singular value must be within 5 % of σ₁.
        directions: z, in columns.
        floor: ignore singular values below this share of sigma₁.
        of_images: z = Wᵀ·z′, and the bounds are for the left singular vectors: ⟨p_i, z′⟩ = ⟨q_i, z⟩/σ_i.
        enough: bounds below this value are not improved further.
    """
    problems = _Problems(space, directions, of_images)
    if problems.largest <= 0:  # W is 0 and has no singular vectors with σ > 0
        return CosineBounds(problems.sizes * 0, directions)
    low, high = problems.intervals(floor)
    found = problems.bounds(low, high)
    for _ in range(_ROUNDS):
        worst, at = found.max(dim=1, keepdim=True)
        centre = (low + high).gather(1, at) / 2
        hopeless = (problems.bounds(centre, centre) >= enough) & (enough > 0)
        if bool(((worst < enough) | hopeless).all()):
            break  # each bound is low enough, or smaller intervals cannot lower it enough
        picked = found.topk(min(_WORST, found.shape[1]), dim=1).indices
        rest = torch.ones_like(found, dtype=torch.bool).scatter(1, picked, False)
        edges = torch.linspace(0, 1, _SPLIT + 1, dtype=torch.float64)
        split = low.gather(1, picked)[:, :, None] + (high - low).gather(1, picked)[:, :, None] * edges
        starts, ends = (part.flatten(1) for part in (split[:, :, :-1], split[:, :, 1:]))
        kept = [part[rest].view(len(part), -1) for part in (low, high, found)]
        low, high = torch.cat([kept[0], starts], dim=1), torch.cat([kept[1], ends], dim=1)
        found = torch.cat([kept[2], problems.bounds(starts, ends)], dim=1)
    worst, at = found.max(dim=1, keepdim=True)
    return CosineBounds(worst[:, 0].clamp_max(1), problems.left_over((low + high).gather(1, at) / 2))


def proven_floor(W: Float[Tensor, "d h"], strongest: float) -> float:
    """A share f of sigma₁ such that W (d ≤ h) has no singular value below f·sigma₁.

    Tries 5 %, 2.5 % and so on. WWᵀ − f²·σ₁² has a Cholesky factor if and only if every singular value is
    above f·σ₁. Returns 0 if W has a singular value so small that rounding of the products hides it.

    Args:
        W: float32 or float64.
        strongest: sigma₁.
    """
    gram = W.new_zeros(len(W), len(W))
    for start in range(0, len(W), _ROWS):
        stop = start + _ROWS
        gram[start:stop, :stop] = W[start:stop] @ W[:stop].mT
    scaled, diagonal = gram.double() / strongest**2, gram.diagonal().double() / strongest**2
    share = FLOOR
    while share**2 >= _NOISE / 2:
        scaled.diagonal().copy_(diagonal - _ABOVE * share**2 - _NOISE)
        if not int(torch.linalg.cholesky_ex(scaled).info):
            return share
        share /= 2
    return 0.0


class _Problems:
    """The least squares problems of several directions for all λ, in float64.

    The basis is the eigenvectors of WᵀW within the space: WᵀW·Y·x = λ·Y·x + L·x, where the leak L lies
    outside of Y. In a large space, each problem is solved in a subspace, because its cost grows with the
    third power of the size.
    """

    def __init__(self, space: KrylovSpace, z: Float[Tensor, "h k"], of_images: bool) -> None:
        self.space, self.z, self.of_images = space, z, of_images
        self.leak = (space.backs - space.basis @ space.gram.to(z)).double()
        self.values, self.vectors = torch.linalg.eigh(space.gram)
        self.largest = float(self.values[-1]) if space.size else 0.0
        self.noise = _NOISE * self.largest
        inner = space.basis.mT @ z
        outside = self.leak.mT @ (z - space.basis @ inner).double()
        along = (self.vectors.mT @ inner.double()).mT
        self.part = _useful_part(self.values, along)
        weighted, leaking = self.values[:, None] * self.part, self.vectors @ self.part
        leaks = self.leak.mT @ self.leak
        self.linear = self.part.mT @ weighted
        self.square = weighted.mT @ weighted + leaking.mT @ (leaks @ leaking)
        self.start = _times(weighted.mT, along) + _times(leaking.mT, outside.mT)
        self.along = _times(self.part.mT, along)
        self.sizes = torch.linalg.vector_norm(z.double(), dim=0)

    def intervals(self, floor: float) -> tuple[Float[Tensor, "k n"], Float[Tensor, "k n"]]:
        """Lower and upper ends of intervals that cover all λ; narrower near the space's eigenvalues."""
        lowest, highest = floor**2 * self.largest, _ABOVE * self.largest
        within = self.values[(self.values > lowest) & (self.values < highest)]
        picked = within[torch.linspace(0, max(len(within) - 1, 0), min(len(within), _PARTS)).long()]
        even = torch.linspace(lowest, highest, _PARTS // 2, dtype=torch.float64)
        edges = torch.cat([even, (picked[1:] + picked[:-1]) / 2]).unique().expand(len(self.sizes), -1)
        return edges[:, :-1], edges[:, 1:]

    def bounds(self, low: Float[Tensor, "k n"], high: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """The bound of each direction in each of its intervals."""
        a, right, slack = self._solve((low + high) / 2, (high - low) / 2 + self.noise)
        lengths, sizes = torch.linalg.vector_norm(a, dim=2), self.sizes[:, None]
        squares = sizes.square() - (a * right).sum(2) - (slack * lengths).square()
        found = (squares.clamp_min(0).sqrt() + slack * lengths).minimum(sizes)
        return found / low.clamp_min(self.noise).sqrt() if self.of_images else found

    def left_over(self, at: Float[Tensor, "k 1"]) -> Float[Tensor, "h k"]:
        """z − (WᵀW − λ)·Y·a of each direction at one λ per direction."""
        a = self._solve(at, torch.full_like(at, self.noise))[0][:, 0]
        inner = _times(self.part, a)
        within = self.vectors @ ((self.values - at) * inner).mT
        made = self.space.basis @ within.to(self.z) + (self.leak @ (self.vectors @ inner.mT)).to(self.z)
        return self.z - made

    def _solve(
        self, centre: Float[Tensor, "k n"], slack: Float[Tensor, "k n"]
    ) -> tuple[Float[Tensor, "k n m"], Float[Tensor, "k n m"], Float[Tensor, "k n"]]:
        system = self.square[:, None] - 2 * centre[:, :, None, None] * self.linear[:, None]
        system.diagonal(dim1=2, dim2=3).add_((centre.square() + slack.square())[:, :, None])
        right = self.start[:, None] - centre[:, :, None] * self.along[:, None]
        a = torch.cholesky_solve(right[..., None], torch.linalg.cholesky(system))[..., 0]
        return a, right, slack


def _useful_part(values: Float[Tensor, " m"], along: Float[Tensor, "k m"]) -> Float[Tensor, "k m n"]:
    """A subspace for each direction: the whole space, or the strongest directions and a Krylov space."""
    whole = torch.eye(len(values), dtype=torch.float64).expand(len(along), -1, -1)
    if len(values) <= _STRONGEST + _DEGREE:
        return whole
    part, new = whole[:, :, -_STRONGEST:], along
    for _ in range(_DEGREE):
        before = new.norm(dim=1, keepdim=True)
        for _ in range(2):
            new = new - _times(part, _times(part.mT, new))
        size = new.norm(dim=1, keepdim=True)
        new = torch.where(size > _ZERO * before, new / size, 0)
        part = torch.cat([part, new[:, :, None]], dim=2)
        new = values * new
    return part


def _times(matrices: Float[Tensor, "k m n"], vectors: Float[Tensor, "k n"]) -> Float[Tensor, "k m"]:
    return (matrices @ vectors[:, :, None])[:, :, 0]
