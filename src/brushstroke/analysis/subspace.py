"""Compares two adapters: the directions that their updates share at each site, with chance levels.

Does not need a base. The chance levels are in closed form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.analysis import overlap
from brushstroke.analysis.table import SiteTable
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.checks import check_alike
from brushstroke.errors import ConfigError, did_you_mean
from brushstroke.lowrank import LowRank, Svd
from brushstroke.lowrank.spectra import above_rounding, product_rounding, rounding_along

Of = Literal["delta", "U", "V"]


@dataclass(frozen=True, eq=False)
class SiteOverlap:
    """The comparison of two updates of one weight; grids hold φ(i, j) at [i−1, j−1], float64.

    Args:
        shape: (d, h).
        ranks: the number of directions of each update: its singular values above rounding.
        left: φ of the input directions (in R^d); None if only V is compared.
        right: φ of the output directions (in R^h); None if only U is compared.
        cosine: ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖); its chance level is 0, with a standard deviation of about 1/√(d·h).
        weighted_left: overlap of the input directions weighted by σ₁²·σ₂², in [0, 1].
        weighted_right: the same for the output directions.
        weighted_chance_left: the mean of `weighted_left` for random directions.
        weighted_chance_right: the same for the output directions.
    """

    shape: tuple[int, int]
    ranks: tuple[int, int]
    left: Float[Tensor, "i j"] | None
    right: Float[Tensor, "i j"] | None
    cosine: float
    weighted_left: float | None = None
    weighted_right: float | None = None
    weighted_chance_left: float | None = None
    weighted_chance_right: float | None = None

    @property
    def chance_left(self) -> Float[Tensor, "i j"]:
        """E φ(i, j) = max(i, j)/d."""
        return overlap.chance(*self.ranks, self.shape[0])

    @property
    def chance_right(self) -> Float[Tensor, "i j"]:
        """E φ(i, j) = max(i, j)/h."""
        return overlap.chance(*self.ranks, self.shape[1])

    @property
    def z_left(self) -> Float[Tensor, "i j"] | None:
        """φ of the input directions above chance, in standard deviations of chance."""
        return None if self.left is None else overlap.z_scores(self.left, self.shape[0])

    @property
    def z_right(self) -> Float[Tensor, "i j"] | None:
        """φ of the output directions above chance, in standard deviations of chance."""
        return None if self.right is None else overlap.z_scores(self.right, self.shape[1])

    def block(self, size: int | None = None) -> dict[str, int | float]:
        """φ(size, size) of each side with its chance level and z-score.

        A block is more stable than φ(1, 1): if two singular values are nearly equal, their directions change
        places between runs.

        Args:
            size: the number of directions; by default the smaller rank.

        Raises:
            ConfigError: one of the updates has fewer directions.
        """
        size = min(self.ranks) if size is None else size
        if not 1 <= size <= min(self.ranks):
            raise ConfigError(
                f"the size of a block must be between 1 and {min(self.ranks)} directions; got {size}"
            )
        at = (size - 1, size - 1)
        values: dict[str, int | float] = {"size": size}
        for side, grid, z, n in (
            ("left", self.left, self.z_left, self.shape[0]),
            ("right", self.right, self.z_right, self.shape[1]),
        ):
            if grid is not None and z is not None:
                values |= {side: float(grid[at]), f"chance_{side}": size / n, f"z_{side}": float(z[at])}
        return values

    def derived(self) -> dict[str, Any]:
        """Values computed from the fields."""
        return {
            "chance_left": None if self.left is None else self.chance_left,
            "chance_right": None if self.right is None else self.chance_right,
            "z_left": self.z_left,
            "z_right": self.z_right,
            "block": self.block(),
        }


@dataclass(frozen=True)
class Unmatched:
    """Sites that could not be compared.

    Args:
        only_first: sites that only the first adapter has.
        only_second: sites that only the second adapter has.
        zero: sites where at least one update is zero, so that it has no directions.
    """

    only_first: tuple[str, ...] = field(default=())
    only_second: tuple[str, ...] = field(default=())
    zero: tuple[str, ...] = field(default=())


class Overlap(SiteTable[SiteOverlap]):
    """Site → `SiteOverlap` of two adapters.

    Args:
        rows: the results.
        of: whose directions are compared: "delta" for ΔW, or one factor, "U" or "V".
        unmatched: sites without a result.
        cosine: ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖) over all shared sites; None if an adapter is zero at all of them.
    """

    def __init__(
        self, rows: Mapping[str, SiteOverlap], *, of: Of, unmatched: Unmatched, cosine: float | None
    ) -> None:
        super().__init__(rows)
        self.of, self.unmatched, self.cosine = of, unmatched, cosine

    @property
    def sides(self) -> list[str]:
        """The sides that were compared: "left" and "right", or one of them."""
        return {"delta": ["left", "right"], "U": ["left"], "V": ["right"]}[self.of]

    def _absent(self, site: str) -> str:
        if site in self.unmatched.zero:
            return f"the update at {site!r} is zero in one of the adapters: it has no directions to compare"
        if site in self.unmatched.only_first + self.unmatched.only_second:
            return f"only one of the adapters has the site {site!r}"
        return f"no result for the site {site!r}{did_you_mean(site, self)}"

    def totals(self) -> dict[str, Any]:
        """The settings, the cosine over all sites, and the sites without a result."""
        return {"of": self.of, "cosine": self.cosine, "unmatched": self.unmatched}


def subspace(first: Adapter, second: Adapter, *, of: Of = "delta") -> Overlap:
    """The normalised subspace similarity φ(i, j) at every site that both adapters have, for all i and j.

    A zero update has no directions, and φ is undefined there: such sites have no row, and are listed in
    `unmatched.zero`.

    Source: arXiv:2106.09685, eq. 4 and appendix G, whose matrices are (out×in). The paper uses the right
    vectors of A (r×in); U is Aᵀ, so here they are the `left` ones. By default the directions are those of ΔW:
    a single factor changes with every (U·M, M⁻¹·V), although ΔW does not.

    Args:
        first: the adapter whose directions i counts.
        second: the adapter whose directions j counts.
        of: "delta" for ΔW, or "U" or "V" for that factor alone, as in the paper.

    Raises:
        ConfigError: `of` has another value.
        ShapeError: the adapters have no site in common, or a site has different shapes, or an update has no
            factors.

    >>> import torch
    >>> a = Adapter({"fc": LowRank(torch.eye(4, 2), torch.diag(torch.tensor([3.0, 1.0])))})
    >>> float(subspace(a, a)["fc"].right[1, 1])
    1.0
    """
    if of not in ("delta", "U", "V"):
        raise ConfigError(f"of must be 'delta', 'U' or 'V'; got {of!r}")
    ones, twos = low_rank_updates(first), low_rank_updates(second)
    check_alike(*({site: update.shape for site, update in one.items()} for one in (ones, twos)))
    shared = [site for site in ones if site in twos]
    rows: dict[str, SiteOverlap] = {}
    zero = []
    inner, squares = 0.0, [0.0, 0.0]
    for site in shared:
        one, two = ones[site], twos[site]
        decomposed = one.svd(), two.svd()
        product = one.inner(two)
        norms = [float(parts.sigma.square().sum()) for parts in decomposed]
        inner, squares = inner + product, [total + norm for total, norm in zip(squares, norms, strict=True)]
        row = _compare(one, two, decomposed, product, of)
        if row is None:
            zero.append(site)
        else:
            rows[site] = row
    unmatched = Unmatched(
        tuple(site for site in ones if site not in twos),
        tuple(site for site in twos if site not in ones),
        tuple(zero),
    )
    cosine = _clipped(inner, squares) if all(squares) else None
    return Overlap(rows, of=of, unmatched=unmatched, cosine=cosine)


def random_pair(row: SiteOverlap, side: str, seed: int = 0) -> Float[Tensor, "i j"]:
    """φ of one sample of random subspaces with a site's ranks, and its width on this `side` (left, right)."""
    generator = torch.Generator().manual_seed(seed)
    n, (i, j) = row.shape[side == "right"], row.ranks
    return overlap.overlap_grid(
        overlap.random_directions(n, i, generator), overlap.random_directions(n, j, generator)
    )


def _compare(
    one: LowRank, two: LowRank, decomposed: tuple[Svd, Svd], inner: float, of: Of
) -> SiteOverlap | None:
    first, second = (
        _directions(update, parts, of) for update, parts in zip((one, two), decomposed, strict=True)
    )
    ranks = len(first.sigma), len(second.sigma)
    if not all(ranks):
        return None
    d, h = one.shape
    left = right = weighted_left = weighted_right = chance_left = chance_right = None
    if of != "V":
        left = overlap.overlap_grid(first.left, second.left)
        weighted_left = overlap.weighted_overlap(first.left, first.sigma, second.left, second.sigma)
        chance_left = overlap.weighted_chance(first.sigma, second.sigma, d)
    if of != "U":
        right = overlap.overlap_grid(first.right.mT, second.right.mT)
        weighted_right = overlap.weighted_overlap(first.right.mT, first.sigma, second.right.mT, second.sigma)
        chance_right = overlap.weighted_chance(first.sigma, second.sigma, h)
    return SiteOverlap(
        one.shape,
        ranks,
        left,
        right,
        _clipped(inner, [float(parts.sigma.square().sum()) for parts in decomposed]),
        weighted_left,
        weighted_right,
        chance_left,
        chance_right,
    )


def _directions(update: LowRank, parts: Svd, of: Of) -> Svd:
    """The singular triples of ΔW or of one factor, without those below rounding."""
    if of == "delta":
        rounding = product_rounding(*update.factors, parts)
    else:
        factor = update.U if of == "U" else update.V
        parts = Svd(*torch.linalg.svd(factor.double(), full_matrices=False))
        rounding = rounding_along(factor, parts.right.mT)
    kept = above_rounding(parts.sigma, max(update.shape), rounding)
    return Svd(parts.left[:, kept].cpu(), parts.sigma[kept].cpu(), parts.right[kept].cpu())


def _clipped(inner: float, squares: list[float]) -> float:
    size = (squares[0] * squares[1]) ** 0.5
    return max(-1.0, min(1.0, inner / size)) if size else 0.0
