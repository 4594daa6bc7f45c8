"""How much of a direction can lie on one singular vector of a large matrix: upper bounds without its SVD.

It finds no singular vector. Each is orthogonal to all that WᵀW − σ² makes, and what of a direction cannot be
made so bounds its cosine.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from brushstroke.lowrank.krylov import KrylovSpace

FLOOR = 0.05  # of sigma₁: on the side where W has a null space, singular vectors below it are not covered
_NOISE = 100.0  # roundings of σ₁² that a computed WᵀW·x may be off by
_ABOVE = 1.1  # of the largest eigenvalue within the space: W has none above
_SIZE, _STRONGEST = 160, 40  # of what is solved in, and its strongest directions
_PARTS = 64  # intervals of eigenvalues at first
_ROUNDS, _WORST, _SPLIT = (
    5,
    3,
    4,
)  # rounds in which so many intervals of each direction are split into so many


class CosineBounds(NamedTuple):
    """Upper bounds of the largest |cosine| of some directions with any singular vector of W.

    Args:
        values: one for each direction.
        left_over: what the space does not explain of each that was wanted, at its worst; a space that grows
            from these has lower bounds.
    """

    values: Float[Tensor, " k"]
    left_over: Float[Tensor, "h k"]


def cosine_bounds(
    space: KrylovSpace,
    directions: Float[Tensor, "h k"],
    floor: float = 0.0,
    *,
    of_images: bool = False,
    wanted: Bool[Tensor, " k"] | None = None,
    enough: float = 0.0,
) -> CosineBounds:
    """Upper bounds of max_i |⟨q_i, z⟩| over the right singular vectors q_i of W (d×h), for each z.

    With WᵀW·q_i = λ·q_i, q_i is orthogonal to WᵀW·y − λ·y for every y. So |⟨q_i, z⟩| is at most
    ‖z − (WᵀW − λ)·Y·a‖ for a basis Y and any a; the best a is a least squares problem in the size of Y, once
    WᵀW·Y is known. For an interval of λ around c, of half width η, the same a gives that norm at c plus
    η·‖a‖; rounding of WᵀW·Y adds as much for its own size. All λ are covered by such intervals, the worst of
    which are split. Where Y is the Krylov space of z this is its Christoffel function, as Lanczos gives it; a
    Y that holds other directions too, such as W's strongest, can only be better.

    Args:
        space: Y, with WᵀW·Y.
        directions: z, in columns.
        floor: leave out singular values below this share of sigma₁.
        of_images: z = Wᵀ·z′, and the left singular vectors are asked for: ⟨p_i, z′⟩ = ⟨q_i, z⟩/σ_i.
        wanted: directions whose bounds should be as low as they can be; by default all.
        enough: no bound needs to be lower than this.
    """
    wanted = torch.ones(directions.shape[1], dtype=torch.bool) if wanted is None else wanted
    problem = _Problem(space, directions, of_images, wanted)
    if problem.largest <= 0:  # W is 0 and has no singular vectors that count
        return CosineBounds(problem.sizes * 0, directions[:, wanted])
    edges = problem.edges(floor**2 * problem.largest, _ABOVE * problem.largest)
    low, high = edges[:-1], edges[1:]
    found = problem.bounds(low, high)
    for _ in range(_ROUNDS):
        if not bool((found[:, wanted] >= enough).any()):
            break
        picked = torch.zeros(len(low), dtype=torch.bool)
        picked[found[:, wanted].topk(min(_WORST, len(low)), dim=0).indices.reshape(-1)] = True
        part = (high[picked] - low[picked]) / _SPLIT
        starts = (low[picked] + part * torch.arange(_SPLIT)[:, None]).reshape(-1)
        ends = starts + part.repeat(_SPLIT)
        found = torch.cat([found[~picked], problem.bounds(starts, ends)])
        low, high = torch.cat([low[~picked], starts]), torch.cat([high[~picked], ends])
    values, at = found.max(dim=0)
    left_over = problem.left_over(space, directions, low[at], high[at], wanted)
    return CosineBounds(values.clamp_max(1), left_over)


class _Problem:
    """The least squares problems of all λ, in float64 and in the size of the space."""

    def __init__(
        self,
        space: KrylovSpace,
        directions: Float[Tensor, "h k"],
        of_images: bool,
        wanted: Bool[Tensor, " k"],
    ) -> None:
        basis, backs, z = space.basis.double(), space.backs.double(), directions.double()
        inner, along = basis.mT @ backs, basis.mT @ z
        mixed = inner + inner.mT
        values, vectors = torch.linalg.eigh(mixed / 2)
        self.part = _useful_part(values, vectors, along[:, wanted])  # the basis of what is solved in
        self.gram, self.mixed, self.squares = (
            self.part.mT @ square @ self.part for square in (basis.mT @ basis, mixed, backs.mT @ backs)
        )
        self.along, self.across = self.part.mT @ along, self.part.mT @ (backs.mT @ z)
        self.sizes = torch.linalg.vector_norm(z, dim=0)
        self.values = torch.linalg.eigvalsh(self.mixed / 2)
        self.largest = float(values[-1])
        self.noise = _NOISE * torch.finfo(space.basis.dtype).eps * self.largest
        self.of_images = of_images

    def edges(self, lowest: float, highest: float) -> Float[Tensor, " n"]:
        """Edges of intervals between the lowest and the highest λ, closer where the space has eigenvalues."""
        within = self.values[(self.values > lowest) & (self.values < highest)]
        picked = within[torch.linspace(0, max(len(within) - 1, 0), min(len(within), _PARTS)).long()]
        even = torch.linspace(lowest, highest, _PARTS // 4, dtype=torch.float64)
        return torch.cat([even, (picked[1:] + picked[:-1]) / 2]).unique()

    def bounds(self, low: Float[Tensor, " n"], high: Float[Tensor, " n"]) -> Float[Tensor, "n k"]:
        """The bound of each direction in each interval."""
        a, right, slack = self._solve(low, high)
        lengths = torch.linalg.vector_norm(a, dim=1)
        squares = self.sizes.square() - (a * right).sum(1) - (slack[:, None] * lengths).square()
        found = squares.clamp_min(0).sqrt() + slack[:, None] * lengths
        found = torch.minimum(found, self.sizes)
        return found / low.clamp_min(self.noise).sqrt()[:, None] if self.of_images else found

    def left_over(
        self,
        space: KrylovSpace,
        directions: Float[Tensor, "h k"],
        low: Float[Tensor, " k"],
        high: Float[Tensor, " k"],
        wanted: Bool[Tensor, " k"],
    ) -> Float[Tensor, "h n"]:
        """z − (WᵀW − λ)·Y·a of the wanted directions, each in an interval of its own."""
        numbers = torch.nonzero(wanted)[:, 0]
        solved = self._solve(low[numbers], high[numbers])[0]
        a = self.part @ solved[torch.arange(len(numbers)), :, numbers].mT
        at = (low + high)[numbers] / 2
        made = space.backs @ a.to(space.backs) - space.basis @ (a * at).to(space.basis)
        return directions[:, numbers] - made

    def _solve(
        self, low: Float[Tensor, " n"], high: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n m k"], Float[Tensor, "n m k"], Float[Tensor, " n"]]:
        centre, slack = (low + high)[:, None, None] / 2, (high - low) / 2 + self.noise
        system = self.squares - centre * self.mixed + centre.square() * self.gram
        system.diagonal(dim1=1, dim2=2).add_(slack.square()[:, None])
        right = self.across - centre * self.along
        return torch.cholesky_solve(right, torch.linalg.cholesky(system)), right, slack


def _useful_part(
    values: Float[Tensor, " m"], vectors: Float[Tensor, "m m"], along: Float[Tensor, "m k"]
) -> Float[Tensor, "m n"]:
    """Within a large space: its strongest directions, and the Krylov space of those that are judged.

    The cost grows with the third power of the size, and what they do not reach says little of them.
    """
    m = len(values)
    if m <= _SIZE:
        return torch.eye(m, dtype=torch.float64)
    part = vectors[:, -_STRONGEST:]
    block = vectors.mT @ along
    while part.shape[1] < _SIZE and block.shape[1]:
        new = vectors @ block
        for _ in range(2):
            new = new - part @ (part.mT @ new)
        new = torch.linalg.qr(new).Q[:, : _SIZE - part.shape[1]]
        part = torch.cat([part, new], dim=1)
        block = values[:, None] * (vectors.mT @ new)
    return torch.linalg.qr(part).Q
