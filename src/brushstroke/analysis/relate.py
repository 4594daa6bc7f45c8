"""Compares an update with its base's weight: which directions of W it amplifies, and the chance level.

Does not measure whether the update improves the model. Reads W one tensor at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.analysis.directions import DirectionCache, Directions, Working, base_directions
from brushstroke.analysis.overlap import random_directions
from brushstroke.analysis.table import SiteTable
from brushstroke.analysis.weights import OnSite, finite_norm, walk
from brushstroke.checks import check_integer
from brushstroke.lowrank import LowRank, Svd
from brushstroke.lowrank.krylov import multiply

DENSE_LIMIT = 1536  # a W whose smaller side is at most this gets a full SVD
PARTS = 10
_ROUNDING = 64.0  # a projection below this multiple of the rounding of ‖W‖ counts as 0


@dataclass(frozen=True, eq=False)
class Share:
    """The distribution of an update's energy ‖ΔW‖² over W's singular directions, strongest first.

    Args:
        left: for the input directions: ten shares, one per tenth of W's min(d, h) directions.
        right: the same for the output directions.
        chance_left: the expected shares of a random update; less than 0.1 if d > h.
        chance_right: the same for the output directions; less than 0.1 if h > d.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]
    chance_left: tuple[float, ...]
    chance_right: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class SiteRelation:
    """One ΔW compared with its W: ‖leftᵀ·W·rightᵀ‖_F for r input and r output directions.

    Args:
        shape: (d, h).
        rank: r, the number of directions of ΔW above rounding.
        norm_base: ‖W‖_F.
        norm_delta: ‖ΔW‖_F, scale included.
        projection_delta: with the directions of ΔW.
        projection_base: with the first r directions of W, √Σ_{i≤r} σ_i(W)².
        projection_random: with random directions, in closed form: the root mean square, r·‖W‖/√(d·h).
        projection_sampled: with one sample of random directions.
        residual: largest ‖Wᵀ·left − σ·right‖/σ₁ of W's first r directions; 0 after a full SVD of W.
        deciles: energy of ΔW over W's spectrum; None without a full SVD of W.
    """

    shape: tuple[int, int]
    rank: int
    norm_base: float
    norm_delta: float
    projection_delta: float
    projection_base: float
    projection_random: float
    projection_sampled: float
    residual: float
    deciles: Share | None = None

    @property
    def amplification(self) -> float | None:
        """‖ΔW‖/projection_delta, the paper's factor; infinite if the projection is 0, None if ΔW is 0."""
        return amplification(self.norm_delta, self.projection_delta)

    @property
    def amplification_random(self) -> float | None:
        """The amplification of a random update of this norm and rank: ‖ΔW‖·√(d·h)/(r·‖W‖)."""
        return amplification(self.norm_delta, self.projection_random)

    @property
    def ratio_to_chance(self) -> float | None:
        """projection_delta/projection_random: above 1 if ΔW uses directions that W uses; independent of r."""
        return self.projection_delta / self.projection_random if self.projection_random else None

    def derived(self) -> dict[str, Any]:
        """Values computed from the fields."""
        return {
            "amplification": self.amplification,
            "amplification_random": self.amplification_random,
            "ratio_to_chance": self.ratio_to_chance,
        }


class Relation(SiteTable[SiteRelation]):
    """Site → `SiteRelation` of an adapter and its base."""

    def totals(self) -> dict[str, Any]:
        """Root sums of squares over the sites with a non-zero update, and the ratios of these sums."""
        rows = [row for row in self.values() if row.rank]
        names = (
            "norm_base",
            "norm_delta",
            "projection_delta",
            "projection_base",
            "projection_random",
            "projection_sampled",
        )
        sums = {name: sum(getattr(row, name) ** 2 for row in rows) ** 0.5 for name in names}
        chance = sums["projection_random"]
        ratios = [row.ratio_to_chance for row in rows if row.ratio_to_chance is not None]
        return {
            **sums,
            "amplification": amplification(sums["norm_delta"], sums["projection_delta"]),
            "amplification_random": amplification(sums["norm_delta"], chance),
            "ratio_to_chance": sums["projection_delta"] / chance if chance else None,
            "median_ratio_to_chance": median(ratios) if ratios else None,
            "zero": [site for site, row in self.items() if not row.rank],
        }


def amplification(norm_delta: float, projection: float) -> float | None:
    """‖ΔW‖_F / ‖leftᵀ·W·rightᵀ‖_F (arXiv:2106.09685, appendix H.4).

    Infinite if the projection is 0; None if the update is zero.

    >>> round(amplification(6.91, 0.32), 2), round(amplification(3.57, 1.90), 2)
    (21.59, 1.88)
    """
    if norm_delta == 0:
        return None
    return norm_delta / projection if projection else float("inf")


def random_projection(norm_base: float, rank: int, shape: tuple[int, int]) -> float:
    """√E‖leftᵀ·W·rightᵀ‖² = r·‖W‖/√(d·h) for r random input and r random output directions.

    >>> round(random_projection(61.95, 4, (12288, 12288)), 4)
    0.0202
    """
    return rank * norm_base / (shape[0] * shape[1]) ** 0.5


def relate(
    adapter: Adapter,
    base: Any,
    *,
    seed: int = 0,
    dense_limit: int = DENSE_LIMIT,
    allow_different_base: bool = False,
    on_site: OnSite | None = None,
    cache: DirectionCache | None = None,
) -> Relation:
    """‖UᵀWVᵀ‖_F of the paper's table 7 at every site, with its chance level.

    Source: arXiv:2106.09685, section 7.3 and appendix H.4, where W is (out×in), U holds left vectors in
    columns and V right vectors in rows. With W (d×h) the two sides change places, and the norm is the same.
    Neither ΔW nor a projector is formed.

    Args:
        adapter: an adapter with low-rank updates.
        base: a Base, an nn.Module, or a mapping site → W (d×h), which may read lazily.
        seed: for the sampled random directions and the Krylov start.
        dense_limit: a W whose smaller side is at most this gets a full SVD, in float64; a larger W uses block
            Krylov iteration, in float32 for half precision, without deciles.
        allow_different_base: skip the comparison with the fingerprint.
        on_site: called with (site, its number, number of sites) before each site is read.
        cache: a cache of W's directions; None computes them every time.

    Raises:
        ShapeError: an update has no factors, or a site is missing in the base or has another shape there.
        BaseMismatchError: the adapter belongs to another base, or is merged into this one.
        BaseLoadError: a weight contains NaN or infinity, or is too large for float32.
        ConfigError: dense_limit is negative.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> row = relate(Adapter({"fc": LowRank(torch.eye(3, 1), 6 * torch.eye(1, 3))}), {"fc": W})["fc"]
    >>> round(row.projection_delta, 6), round(row.amplification, 6)
    (3.0, 2.0)
    """
    check_integer("dense_limit", dense_limit, 0)
    generator, working = torch.Generator().manual_seed(seed), Working()
    rows = {}
    for site, update, W in walk(adapter, base, allow_different_base=allow_different_base, on_site=on_site):
        delta, dense = update.directions(), min(W.shape) <= dense_limit
        if not len(delta.sigma):
            zero = update.delta_norm()
            rows[site] = SiteRelation(update.shape, 0, finite_norm(site, W), zero, 0.0, 0.0, 0.0, 0.0, 0.0)
            continue
        k = len(delta.sigma)
        known = base_directions(site, W, k, whole=dense, seed=seed, cache=cache, working=working)
        rows[site] = _relate(update, delta, working(W, dense), known, dense, generator)
    return Relation(rows)


def _relate(
    update: LowRank, delta: Svd, work: Tensor, known: Directions, dense: bool, generator: torch.Generator
) -> SiteRelation:
    (d, h), r = update.shape, len(delta.sigma)
    lefts = torch.cat([delta.left.to(work), random_directions(d, r, generator).to(work)], dim=1)
    products = multiply(work.mT, lefts).mT.double()
    random_right = random_directions(h, r, generator).to(products)
    smallest = _ROUNDING * torch.finfo(work.dtype).eps * known.norm
    projection = float((products[:r] @ delta.right.to(products).mT).norm())
    strongest = float(known.sigma[0]) if len(known.sigma) else 0.0
    return SiteRelation(
        (d, h),
        r,
        known.norm,
        update.delta_norm(),
        projection if projection > smallest else 0.0,
        float(known.sigma[:r].double().square().sum().sqrt()),
        random_projection(known.norm, r, (d, h)),
        float((products[r:] @ random_right).norm()),
        float(known.residual[:r].max() / strongest) if strongest else 0.0,
        _deciles(delta, known) if dense else None,
    )


def _deciles(delta: Svd, base: Directions) -> Share:
    """Σ_k σ_k²·(base_i·delta_k)² / Σσ², summed over tenths of the base's directions."""
    d, k = base.left.shape
    h = base.right.shape[1]
    energy = delta.sigma.square() / delta.sigma.square().sum()
    edges = [round(k * part / PARTS) for part in range(PARTS + 1)]
    sides = []
    for of_delta, of_base in ((delta.left, base.left), (delta.right.mT, base.right.mT)):
        along = (of_base.mT @ of_delta.to(of_base)).square() @ energy.to(of_base)
        sides.append(tuple(float(along[a:b].sum()) for a, b in pairwise(edges)))
    chances = [tuple((b - a) / n for a, b in pairwise(edges)) for n in (d, h)]
    return Share(sides[0], sides[1], chances[0], chances[1])


def mean_deciles(found: Mapping[str, SiteRelation]) -> Share | None:
    """The mean deciles over sites, each weighted by its ‖ΔW‖²; None if no site has them."""
    rows = [(row.norm_delta**2, row.deciles) for row in found.values() if row.deciles is not None]
    total = sum(weight for weight, _ in rows)
    if not total:
        return None

    def mean(name: str) -> tuple[float, ...]:
        parts = [(weight, getattr(share, name)) for weight, share in rows]
        return tuple(sum(w * part[n] for w, part in parts) / total for n in range(PARTS))

    return Share(mean("left"), mean("right"), mean("chance_left"), mean("chance_right"))
