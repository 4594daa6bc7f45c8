"""Intruder dimensions: strong directions of W + ΔW that no direction of W resembles, with certificates.

W + ΔW is never formed. What an intruder does to the model's answers is not seen from here.
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
from brushstroke.checks import check_dense_limit, check_intruder_settings
from brushstroke.errors import ConfigError
from brushstroke.lowrank import LowRank, Svd
from brushstroke.lowrank.cosines import FLOOR, cosine_bounds
from brushstroke.lowrank.krylov import TOLERANCE, KrylovSpace, Shifted, TopSvd, top_svd
from brushstroke.lowrank.spectra import numerical_rank
from brushstroke.lowrank.sums import PASSES, top_of_sum

WHOLE_PASSES = 40  # on a W that is decomposed whole, the sum is nearly so too
ROUNDS, STEPS = 8, 3  # of growing the space for directions that are not decided yet, and blocks in each

Verdict = Literal["intruder", "known", "undecided"]


@dataclass(frozen=True, eq=False)
class Direction:
    """One of the strongest output directions of W + ΔW.

    Args:
        position: 0 is the strongest.
        sigma: its singular value in W + ΔW.
        lower: the largest |cosine| with a singular vector of W is at least this.
        upper: and at most this; equal to `lower` where W was decomposed whole. It is sought only where
            `lower` leaves the question open and the direction has converged, and is 1 elsewhere.
        outside: √(1 − ‖part of it within W's strongest directions‖²); near 1 it is new even as a mixture.
        residual: ‖(W + ΔW)ᵀ·left − sigma·right‖/σ₁ of the iteration that found it.
        verdict: "intruder" where upper < ε, "known" where lower ≥ ε, otherwise "undecided".
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
        directions: the top ones, strongest first.
        found: Σ σ·left·right over the intruders, as an update; what the repair scales down.
    """

    shape: tuple[int, int]
    directions: tuple[Direction, ...]
    found: LowRank | None = field(default=None, metadata=HIDDEN)

    def count(self, verdict: Verdict = "intruder") -> int:
        """How many directions have this verdict."""
        return sum(direction.verdict == verdict for direction in self.directions)

    def derived(self) -> dict[str, Any]:
        """What follows from the fields."""
        return {"intruders": self.count(), "undecided": self.count("undecided")}


class Intruders(SiteTable[SiteIntruders]):
    """Site → `SiteIntruders`.

    Args:
        rows: the results.
        top: how many directions were judged at each site.
        threshold: ε.
    """

    def __init__(self, rows: Mapping[str, SiteIntruders], *, top: int, threshold: float) -> None:
        super().__init__(rows)
        self.top, self.threshold = top, threshold

    def count(self, verdict: Verdict = "intruder") -> int:
        """How many directions of all sites have this verdict."""
        return sum(row.count(verdict) for row in self.values())

    def totals(self) -> dict[str, Any]:
        """The settings, and how many of each verdict there are."""
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
    """Which of the strongest output directions of W + ΔW no singular vector of W resembles.

    Source: arXiv:2410.21228, algorithm 1, on the left singular vectors of (out×in) weights: in our (d×h) they
    are the `right` ones, in R^h. A direction y is an intruder where max_i |⟨y, x_i⟩| < ε over all singular
    vectors x_i of W. The top ones come from a Krylov space of W and of the factors; the maximum is exact
    where W is small, and otherwise lies between a hit among W's strongest directions and a bound
    (`cosine_bounds`). A direction that the iteration did not settle is a mixture, and no intruder. Vectors of
    W of singular value 0 are arbitrary, and count as none.

    Args:
        adapter: of low-rank updates.
        base: a Base, an nn.Module, or a mapping site → W (d×h), which may read lazily.
        top: how many directions to judge at each site.
        threshold: ε.
        seed: of the Krylov starts.
        dense_limit: a W whose smaller side is at most this is decomposed whole, in float64.
        allow_different_base: pass over the verdict of the fingerprint.
        on_site: called with (site, its number, how many) before each is read.
        cache: where W's own directions are looked for and kept; without one they are computed every time.

    Raises:
        ConfigError: top below 1, a threshold outside (0, 1], or a negative dense_limit.
        ShapeError: an update without factors, or a base that lacks a site or has another shape there.
        BaseMismatchError: the adapter belongs to another base, or is merged into this one.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 0.0]))
    >>> new = Adapter({"fc": LowRank(torch.eye(3)[:, 2:], 9 * torch.eye(3)[2:])})
    >>> intruders(new, {"fc": W}, top=2)["fc"].count()
    1
    """
    check_intruder_settings(top, threshold)
    check_dense_limit(dense_limit)
    rows, working = {}, Working()
    for site, update, W in walk(adapter, base, allow_different_base=allow_different_base, on_site=on_site):
        dense = min(update.shape) <= dense_limit
        own = base_directions(site, W, 4 * top, whole=dense, seed=seed, cache=cache, working=working)
        floor = partial(base_floor, W, float(own.sigma[0]), working, cache)
        judged = (
            _exact(update, working(W, dense), own, top)
            if dense
            else _bounded(update, working(W, dense), own, top, threshold, floor)
        )
        rows[site] = _site(update.shape, judged, threshold)
    return Intruders(rows, top=top, threshold=threshold)


def repair(adapter: Adapter, found: Intruders, scale: float = 0.75) -> Adapter:
    """The adapter with its intruders scaled down: ΔW − (1 − scale)·Σ σ·left·right over the intruders.

    Exact in factor form: a site's rank grows by the number of its intruders; `truncate` brings it back.
    Undecided directions stay as they are. Source: arXiv:2410.21228, section 5, with λ = scale.

    Raises:
        ConfigError: a scale outside [0, 1], or an adapter that has not the sites of the result.
    """
    if not 0 <= scale <= 1:
        raise ConfigError(f"a scale must be between 0 and 1; got {scale}")
    if set(adapter) != set(found):
        raise ConfigError("the intruders were found in another adapter; look for them in this one first")
    updates = low_rank_updates(adapter)
    repaired: dict[str, LowRank] = {}
    for site, update in updates.items():
        extra = found[site].found
        change = None if extra is None else (scale - 1) * extra.to(update.dtype, update.device)
        repaired[site] = update if change is None else update + change
    return adapter.derived(repaired)


@dataclass(frozen=True, eq=False)
class _Judged:
    """The strongest directions of W + ΔW with what is known of their cosines with W's.

    Args:
        top: the triples.
        lower: of the largest |cosine| of each.
        upper: of the same.
        outside: of W's strongest directions.
    """

    top: TopSvd
    lower: list[float]
    upper: list[float]
    outside: list[float]


def _site(shape: tuple[int, int], judged: _Judged, threshold: float) -> SiteIntruders:
    ours, lower, upper = judged.top, judged.lower, judged.upper
    strongest = float(ours.sigma[0]) or 1.0
    settled = (ours.residual <= TOLERANCE * strongest).tolist()
    directions = tuple(
        Direction(
            position,
            float(ours.sigma[position]),
            lower[position],
            upper[position],
            judged.outside[position],
            float(ours.residual[position]) / strongest,
            _verdict(lower[position], upper[position], threshold, settled[position]),
        )
        for position in range(len(ours.sigma))
        if float(ours.sigma[position]) > 0
    )
    picked = [direction.position for direction in directions if direction.verdict == "intruder"]
    extra = None
    if picked:
        rows = ours.right[picked] * ours.sigma[picked][:, None]
        extra = LowRank(ours.left[:, picked].double(), rows.double())
    return SiteIntruders(shape, directions, extra)


def _exact(update: LowRank, W: Float[Tensor, "d h"], own: Directions, top: int) -> _Judged:
    changed = Shifted(W, update.U.to(W), update.V.to(W), update.scale)
    ours = top_svd(changed, top, passes=WHOLE_PASSES)
    known = own.right[: numerical_rank(own.sigma, max(W.shape))]
    cosines = (ours.right.double() @ known.mT).abs()
    largest = cosines.max(dim=1).values.tolist() if len(known) else [0.0] * len(ours.right)
    return _Judged(ours, largest, largest, _outside(cosines[:, : 4 * top]))


def _bounded(
    update: LowRank,
    W: Float[Tensor, "d h"],
    own: Directions,
    top: int,
    threshold: float,
    floor: Callable[[], float],
) -> _Judged:
    """Everything happens on the smaller side of W, where WᵀW (or WWᵀ) has no null space of its own."""
    turned, parts = W.shape[1] > W.shape[0], update.svd()
    least = TOLERANCE * own.sigma[0]
    settled = (own.residual <= least) & (
        own.sigma > least
    )  # below, it may be of the null space, or a mixture
    # where W's own did not converge, those of the sum that are W's won't: only new ones do, and soon
    passes = PASSES if bool(settled[:top].all()) else PASSES // 2
    if turned:
        found = top_of_sum(W.mT, Svd(parts.right.mT, parts.sigma, parts.left.mT), own.left, top, passes)
        ours = TopSvd(found.top.right.mT, found.top.sigma, found.top.left.mT, found.top.residual)
    else:
        found = top_of_sum(W, parts, own.right.mT, top, passes)
        ours = found.top
    found.space.extend((own.left if turned else own.right.mT)[:, settled])
    cosines = (ours.right.double() @ own.right.mT.double()).abs()
    hits = torch.where(settled, cosines, 0).max(dim=1).values
    open_ = found.settled & (hits < threshold)
    targets = found.back if turned else ours.right.mT
    uppers = torch.ones_like(hits)
    uppers[open_] = _upper_bounds(found.space, targets[:, open_], threshold, FLOOR if turned else None)
    new = uppers < threshold
    if turned and bool(new.any()) and (weakest := floor()) < FLOOR:  # so far, of W's stronger vectors only
        uppers[new] = _upper_bounds(found.space, targets[:, new], threshold, weakest) if weakest else 1.0
    return _Judged(
        ours,
        hits.tolist(),
        torch.maximum(uppers, hits).tolist(),
        _outside(cosines[:, : 4 * top]),
    )


def _upper_bounds(
    space: KrylovSpace, targets: Float[Tensor, "n k"], threshold: float, floor: float | None
) -> Float[Tensor, " k"]:
    """Bounds of cosines with W's singular vectors, in a space that grows while one is not low enough.

    With a floor, of those above this share of sigma₁, and the targets are images.
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


def _verdict(lower: float, upper: float, threshold: float, settled: bool) -> Verdict:
    """A direction that has not converged is a mixture; that none of W's resembles it says nothing."""
    if upper < threshold and settled:
        return "intruder"
    return "known" if lower >= threshold else "undecided"
