"""Intruder dimensions: strong directions of W + ΔW that are far from every direction of W, with bounds.

It forms W + ΔW only if W is small and iteration cannot separate its directions. It does not measure the
effect of intruders on the model's answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.analysis.directions import DirectionCache, Directions, Working, base_directions, base_floor
from brushstroke.analysis.relate import DENSE_LIMIT
from brushstroke.analysis.table import HIDDEN, SiteTable
from brushstroke.analysis.weights import OnSite, low_rank_updates, walk
from brushstroke.checks import check_integer, check_number
from brushstroke.errors import ConfigError
from brushstroke.lowrank import LowRank, Svd
from brushstroke.lowrank.cosines import FLOOR, cosine_bounds
from brushstroke.lowrank.krylov import (
    TOLERANCE,
    KrylovSpace,
    Shifted,
    TopSvd,
    angles,
    dense_svd,
    gaps,
    top_svd,
)
from brushstroke.lowrank.spectra import numerical_rank
from brushstroke.lowrank.sums import PASSES, top_of_sum

WHOLE_PASSES = 40  # passes for a W with a full SVD; they decompose the sum almost completely
ROUNDS, STEPS = 8, 3  # rounds that extend the space for undecided directions, and blocks per round

Verdict = Literal["intruder", "known", "undecided"]


@dataclass(frozen=True, eq=False)
class Direction:
    """One of the strongest output directions of W + ΔW.

    Args:
        position: 0 is the strongest.
        sigma: its singular value in W + ΔW.
        lower: the largest |cosine| with a singular vector of W is at least this.
        upper: and at most this. After a full SVD of W the two differ only by the error of the direction
            itself. Otherwise it is computed only if `lower` is below ε and the direction has converged; else
            it is 1.
        outside: √(1 − ‖part of it within W's strongest directions‖²); near 1 the direction is also far from
            every mixture of them.
        residual: ‖(W + ΔW)ᵀ·left − sigma·right‖/σ₁ of the iteration that found it.
        verdict: "intruder" if upper < ε, "known" if lower ≥ ε, otherwise "undecided".
    """

    position: int
    sigma: float
    lower: float
    upper: float
    outside: float
    residual: float
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class SiteIntruders:
    """The strongest directions of W + ΔW at one site, and which of them are intruders.

    Args:
        shape: (d, h).
        directions: the top directions, strongest first.
        found: Σ σ·left·right over the intruders, as an update; `repair` scales it down.
    """

    shape: tuple[int, int]
    directions: tuple[Direction, ...]
    found: LowRank | None = field(default=None, metadata=HIDDEN)

    def count(self, verdict: Verdict = "intruder") -> int:
        """The number of directions with this verdict."""
        return sum(direction.verdict == verdict for direction in self.directions)

    def derived(self) -> dict[str, Any]:
        """Values computed from the fields."""
        return {"intruders": self.count(), "undecided": self.count("undecided")}


class Intruders(SiteTable[SiteIntruders]):
    """Site → `SiteIntruders`.

    Args:
        rows: the results.
        top: the number of directions checked at each site.
        threshold: ε.
    """

    def __init__(self, rows: Mapping[str, SiteIntruders], *, top: int, threshold: float) -> None:
        super().__init__(rows)
        self.top, self.threshold = top, threshold

    def count(self, verdict: Verdict = "intruder") -> int:
        """The number of directions with this verdict over all sites."""
        return sum(row.count(verdict) for row in self.values())

    def totals(self) -> dict[str, Any]:
        """The settings, and the number of directions by verdict."""
        return {
            "top": self.top,
            "threshold": self.threshold,
            "intruders": self.count(),
            "undecided": self.count("undecided"),
            "directions": sum(len(row.directions) for row in self.values()),
        }


def intruders(
    adapter: Adapter,
    base: Any,
    *,
    top: int = 10,
    threshold: float = 0.5,
    seed: int = 0,
    dense_limit: int = DENSE_LIMIT,
    allow_different_base: bool = False,
    on_site: OnSite | None = None,
    cache: DirectionCache | None = None,
) -> Intruders:
    """Find the strongest output directions of W + ΔW that are far from every singular vector of W.

    Source: arXiv:2410.21228, algorithm 1, which uses the left singular vectors of (out×in) weights; for
    weights W (d×h) they are the `right` ones, in R^h. A direction y is an intruder if max_i |⟨y, x_i⟩| < ε
    over all singular vectors x_i of W. The strongest directions come from a Krylov space of W and of the
    factors. If W is small, all x_i are known; otherwise the maximum lies between the largest cosine with W's
    strongest directions and an upper bound (`cosine_bounds`). Both bounds allow for the error of y, which is
    large if its singular value is close to another one (`angles`). Singular vectors of W with equal singular
    values are arbitrary within their subspace: the cosine with the subspace counts. Those with singular value
    0 are ignored. An update of zeros has no intruders.

    Args:
        adapter: an adapter with low-rank updates.
        base: a Base, an nn.Module, or a mapping site → W (d×h), which may read lazily.
        top: the number of directions to check at each site.
        threshold: ε.
        seed: for the Krylov starts.
        dense_limit: a W whose smaller side is at most this gets a full SVD, in float64.
        allow_different_base: skip the comparison with the fingerprint.
        on_site: called with (site, its number, number of sites) before each site is read.
        cache: a cache of W's directions; None computes them every time.

    Raises:
        ConfigError: top is below 1, the threshold is outside (0, 1], or dense_limit is negative.
        ShapeError: an update has no factors, or a site is missing in the base or has another shape there.
        BaseMismatchError: the adapter belongs to another base, or is merged into this one.
        BaseLoadError: a weight contains NaN or infinity, or is too large for float32.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    >>> new = Adapter({"fc": LowRank(torch.eye(3)[:, 2:], 9 * torch.eye(3)[2:])})
    >>> intruders(new, {"fc": W}, top=2)["fc"].count()
    1
    """
    check_integer("top", top)
    check_number("the threshold", threshold, above=0, at_most=1)
    check_integer("dense_limit", dense_limit, 0)
    rows, working = {}, Working()
    for site, update, W in walk(adapter, base, allow_different_base=allow_different_base, on_site=on_site):
        dense = min(update.shape) <= dense_limit
        known = base_directions(site, W, 4 * top, whole=dense, seed=seed, cache=cache, working=working)
        floor = partial(base_floor, W, float(known.sigma[0]), working, cache)
        if update.delta_norm() == 0:
            compared = _unchanged(known, top)
        elif dense:
            compared = _exact(update, working(W, dense), known, top, threshold)
        else:
            compared = _bounded(update, working(W, dense), known, top, threshold, floor)
        rows[site] = _site(update.shape, compared, threshold)
    return Intruders(rows, top=top, threshold=threshold)


def repair(adapter: Adapter, found: Intruders, scale: float = 0.75) -> Adapter:
    """The adapter with its intruders scaled down: ΔW − (1 − scale)·Σ σ·left·right over the intruders.

    Exact in factor form: the rank of a site grows by the number of its intruders; `truncate` reduces it.
    Undecided directions do not change. Source: arXiv:2410.21228, section 5, with λ = scale.

    Raises:
        ConfigError: the scale is outside [0, 1], or the adapter and the result have different sites.
    """
    check_number("the scale of a repair", scale, at_least=0, at_most=1)
    if set(adapter) != set(found):
        raise ConfigError("the intruders were found in another adapter; call intruders() on this one first")
    updates = low_rank_updates(adapter)
    repaired: dict[str, LowRank] = {}
    for site, update in updates.items():
        extra = found[site].found
        change = None if extra is None else (scale - 1) * extra.to(update.dtype, update.device)
        repaired[site] = update if change is None else update + change
    return adapter.derived(repaired)


@dataclass(frozen=True, eq=False)
class _Compared:
    """The strongest directions of W + ΔW, with bounds of their cosines with the directions of W.

    Args:
        top: the triples.
        lower: lower bounds of the largest |cosine| of each.
        upper: upper bounds of the same.
        outside: norm of the part of each outside of W's strongest directions.
    """

    top: TopSvd
    lower: list[float]
    upper: list[float]
    outside: list[float]


def _site(shape: tuple[int, int], compared: _Compared, threshold: float) -> SiteIntruders:
    changed, lower, upper = compared.top, compared.lower, compared.upper
    strongest = float(changed.sigma[0]) or 1.0
    directions = tuple(
        Direction(
            position,
            float(changed.sigma[position]),
            lower[position],
            upper[position],
            compared.outside[position],
            float(changed.residual[position]) / strongest,
            _verdict(lower[position], upper[position], threshold),
        )
        for position in range(len(changed.sigma))
        if float(changed.sigma[position]) > 0
    )
    picked = [direction.position for direction in directions if direction.verdict == "intruder"]
    extra = None
    if picked:
        rows = changed.right[picked] * changed.sigma[picked][:, None]
        extra = LowRank(changed.left[:, picked].double(), rows.double())
    return SiteIntruders(shape, directions, extra)


def _unchanged(known: Directions, top: int) -> _Compared:
    """The directions of W itself."""
    parts = known.left[:, :top], known.sigma[:top], known.right[:top]
    k = len(known.sigma[:top])
    changed = TopSvd(*parts, known.residual[:top], gaps(known.sigma)[:top])
    return _Compared(changed, [1.0] * k, [1.0] * k, [0.0] * k)


def _exact(
    update: LowRank, W: Float[Tensor, "d h"], known: Directions, top: int, threshold: float
) -> _Compared:
    """The cosines with all singular vectors of W."""
    U, V = update.U.to(W), update.V.to(W)
    compared = _with_all(top_svd(Shifted(W, U, V, update.scale), top, passes=WHOLE_PASSES), known, top)
    bounds = zip(compared.lower, compared.upper, strict=True)
    if any(_verdict(lower, upper, threshold) == "undecided" for lower, upper in bounds):
        return _with_all(_top_of_dense(W.addmm(U, V, alpha=update.scale), top), known, top)
    return compared


def _top_of_dense(W: Float[Tensor, "d h"], top: int) -> TopSvd:
    """The strongest directions by a full SVD in float64."""
    left, sigma, right = dense_svd(W)
    gap = gaps(sigma)[:top]
    rounding = torch.full_like(gap, _rounding(sigma, max(W.shape)))
    return TopSvd(left[:, :top], sigma[:top], right[:top], rounding, gap)


def _with_all(changed: TopSvd, known: Directions, top: int) -> _Compared:
    """Bounds from all singular vectors of W; those of equal singular values count as one subspace."""
    size = max(known.left.shape[0], known.right.shape[1])
    rank = numerical_rank(known.sigma, size)
    cosines = (changed.right.double() @ known.right[:rank].mT).abs()
    sigma, largest = known.sigma[:rank], cosines.new_zeros(len(cosines))
    if rank:
        apart = sigma[:-1] - sigma[1:] > 100 * _rounding(sigma, size)
        subspace = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
        squares = cosines.new_zeros(len(cosines), int(subspace[-1]) + 1)
        largest = squares.index_add_(1, subspace, cosines.square()).max(dim=1).values.sqrt()
    angle = angles(changed.residual, changed.gap)
    lower, upper = _turned(largest, angle).tolist(), _turned(largest, -angle).tolist()
    return _Compared(changed, lower, upper, _outside(cosines[:, : 4 * top]))


def _rounding(sigma: Float[Tensor, " k"], size: int) -> float:
    """The error of singular values from a full SVD in float64; `size` is the longer side of the matrix."""
    return size * torch.finfo(torch.float64).eps * float(sigma[0])


def _turned(cosine: Float[Tensor, "*n k"], angle: Float[Tensor, " k"]) -> Float[Tensor, "*n k"]:
    """The cosine after the angle between two directions grows by `angle`, which may be negative."""
    return (cosine.double().clamp_max(1).acos() + angle).clamp(0, torch.pi / 2).cos()


def _bounded(
    update: LowRank,
    W: Float[Tensor, "d h"],
    known: Directions,
    top: int,
    threshold: float,
    floor: Callable[[], float],
) -> _Compared:
    """Bounds of the cosines, computed on the smaller side of W, where W's shape forces no null space."""
    transposed, parts = W.shape[1] > W.shape[0], update.svd()
    least = TOLERANCE * known.sigma[0]
    # a direction with a smaller sigma may belong to the null space, or be a mixture
    converged = (known.residual <= least) & (known.sigma > least)
    # if directions of W did not converge, those that the sum shares with W will not; new ones converge early
    passes = PASSES if bool(converged[:top].all()) else PASSES // 2
    if transposed:
        found = top_of_sum(W.mT, Svd(parts.right.mT, parts.sigma, parts.left.mT), known.left, top, passes)
        changed = found.top.mT
    else:
        found = top_of_sum(W, parts, known.right.mT, top, passes)
        changed = found.top
    found.space.extend((known.left if transposed else known.right.mT)[:, converged])
    cosines = (changed.right.double() @ known.right.mT.double()).abs()
    gap = gaps(known.sigma)
    if len(gap) < min(W.shape):
        gap[-1] = 0  # the next singular value is not known
    hits = torch.where(converged, _turned(cosines, angles(known.residual, gap)), 0).max(dim=1).values
    undecided = found.settled & (hits < threshold)
    targets = found.back if transposed else changed.right.mT
    uppers = torch.ones_like(hits)
    uppers[undecided] = _upper_bounds(
        found.space, targets[:, undecided], threshold, FLOOR if transposed else None
    )
    new = uppers < threshold
    if transposed:  # the bounds so far ignore singular values of W below FLOOR
        uppers[~new] = 1.0
        if bool(new.any()) and (weakest := floor()) < FLOOR:
            uppers[new] = _upper_bounds(found.space, targets[:, new], threshold, weakest) if weakest else 1.0
    angle = angles(changed.residual, changed.gap)
    return _Compared(
        changed,
        _turned(hits, angle).tolist(),
        _turned(torch.maximum(uppers, hits), -angle).tolist(),
        _outside(cosines[:, : 4 * top]),
    )


def _upper_bounds(
    space: KrylovSpace, targets: Float[Tensor, "n k"], threshold: float, floor: float | None
) -> Float[Tensor, " k"]:
    """Bounds of cosines with W's singular vectors; extends the space while a bound is not low enough.

    With a floor, only singular values above this share of sigma₁ count, and the targets are images.
    """
    if not targets.shape[1]:
        return torch.zeros(0, dtype=torch.float64)
    settings = {"floor": floor or 0.0, "of_images": floor is not None, "enough": threshold}
    bounds = cosine_bounds(space, targets, **settings)
    for _ in range(ROUNDS):
        undecided = bounds.values >= threshold
        if not bool(undecided.any()):
            break
        block = bounds.left_over[:, undecided]
        for _ in range(STEPS):
            block = space.extend(block)
        bounds = cosine_bounds(space, targets, **settings)
    return bounds.values


def _outside(cosines: Float[Tensor, "k m"]) -> list[float]:
    return (1 - cosines.square().sum(dim=1)).clamp_min(0).sqrt().tolist()


def _verdict(lower: float, upper: float, threshold: float) -> Verdict:
    if upper < threshold:
        return "intruder"
    return "known" if lower >= threshold else "undecided"
