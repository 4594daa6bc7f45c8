"""Two adapters side by side: the directions that their updates share, site by site.

It needs no base. What chance would give stands beside every number, in closed form.
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
    """How two updates of one weight compare; grids hold φ(i, j) at [i−1, j−1], float64.

    Args:
        shape: (d, h).
        ranks: how many directions of either update are there: singular values above rounding.
        left: φ of the input directions (in R^d); None where only V was asked for.
        right: φ of the output directions (in R^h); None where only U was asked for.
        cosine: ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖); its chance level is 0, with a deviation of about 1/√(d·h).
        weighted_left: overlap of the input directions weighted by σ₁²·σ₂², in [0, 1].
        weighted_right: the same of the output directions.
        weighted_chance_left: its average for random directions.
        weighted_chance_right: the same of the output directions.
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
        """φ(size, size) of either side with its chance level and z-score; by default of the smaller rank.

        A block is steadier than φ(1, 1): where two singular values nearly agree, their directions change
        places between runs.

        Raises:
            ConfigError: one of the updates has not that many directions.
        """
        size = min(self.ranks) if size is None else size
        if not 1 <= size <= min(self.ranks):
            raise ConfigError(f"a block must be between 1 and {min(self.ranks)} directions; got {size}")
        at = (size - 1, size - 1)
        told: dict[str, int | float] = {"size": size}
        for side, grid, z, n in (
            ("left", self.left, self.z_left, self.shape[0]),
            ("right", self.right, self.z_right, self.shape[1]),
        ):
            if grid is not None and z is not None:
                told |= {side: float(grid[at]), f"chance_{side}": size / n, f"z_{side}": float(z[at])}
        return told

    def derived(self) -> dict[str, Any]:
        """What follows from the fields."""
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
        only_first: sites that the second adapter lacks.
        only_second: sites that the first adapter lacks.
        zero: sites where an update is zero, so that it has no directions.
    """

    only_first: tuple[str, ...] = field(default=())
    only_second: tuple[str, ...] = field(default=())
    zero: tuple[str, ...] = field(default=())


class Overlap(SiteTable[SiteOverlap]):
    """Site → `SiteOverlap` of two adapters.

    Args:
        rows: the results.
        of: whose directions: those of ΔW, or of one factor alone.
        unmatched: sites that were left out.
        cosine: ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖·‖ΔW₂‖) over all sites that both have; None where one is zero at all of them.
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
        """Whose directions, the cosine over all sites, and what was left out."""
        return {"of": self.of, "cosine": self.cosine, "unmatched": self.unmatched}


def subspace(first: Adapter, second: Adapter, *, of: Of = "delta") -> Overlap:
    """The normalised subspace similarity φ(i, j) at every site that both have, for all i and j.

    An update that is zero has no directions, and φ is undefined there: such sites have no row, and are named
    in `unmatched.zero`.

    Source: arXiv:2106.09685, eq. 4 and appendix G, whose matrices are (out×in). The paper took the right
    vectors of A (r×in); our U is Aᵀ, so they are the `left` ones here. By default ours are of ΔW itself:
    a factor alone changes with every (U·M, M⁻¹·V), although ΔW does not.

    Args:
        first: its directions are counted by i.
        second: its directions are counted by j.
        of: "delta" for ΔW, or "U" or "V" for that factor alone, as the paper did.

    Raises:
        ConfigError: `of` is none of these.
        ShapeError: no common site, or sites of different shapes.

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
    """φ of two random Gaussian matrices with a site's shape and ranks, drawn once; of their `side`."""
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
    """The singular triples of ΔW or of one factor, without those that are rounding."""
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
