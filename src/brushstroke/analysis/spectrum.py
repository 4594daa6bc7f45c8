"""The singular values of every update of an adapter, and the ranks that follow from them.

Does not need a base (with one, it also gives norms relative to ‖W‖), and does not truncate (`budget` does).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.analysis.table import SiteTable, kind_names
from brushstroke.analysis.weights import finite_norm, low_rank_updates, walk
from brushstroke.checks import check_number
from brushstroke.lowrank.spectra import (
    above_rounding,
    effective_rank,
    energy_rank,
    numerical_rank,
    product_rounding,
    stable_rank,
)


@dataclass(frozen=True, eq=False)
class SiteSpectrum:
    """The spectrum of one ΔW, scale included.

    Args:
        shape: (d, h).
        rank: r of the factors.
        sigma: singular values, descending, float64, k = min(r, d, h).
        norm: ‖ΔW‖_F.
        norm_base: ‖W‖_F, if a base was given.
        rounding: the part of each singular value that rounding of the factors to their dtype can explain.
    """

    shape: tuple[int, int]
    rank: int
    sigma: Float[Tensor, " k"]
    norm: float
    norm_base: float | None = None
    rounding: Float[Tensor, " k"] | None = None

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F."""
        return self.norm / self.norm_base if self.norm_base else None

    @property
    def numerical_rank(self) -> int:
        """The number of singular values above rounding of the factors to their dtype, and of float64."""
        return numerical_rank(self.sigma, max(self.shape), self.rounding)

    @property
    def stable_rank(self) -> float:
        """Σσ²/σ₁²."""
        return stable_rank(self.sigma)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of σ/Σσ over the σ above rounding (Roy and Vetterli 2007)."""
        return effective_rank(self.sigma[above_rounding(self.sigma, max(self.shape), self.rounding)])

    def energy_rank(self, share: float) -> int:
        """The smallest rank that keeps this share of ‖ΔW‖².

        Raises:
            ConfigError: the share is not in (0, 1].
        """
        check_number("a share of the energy", share, above=0, at_most=1)
        return energy_rank(self.sigma, share)

    def derived(self) -> dict[str, Any]:
        """Values computed from the fields."""
        return {
            "relative_norm": self.relative_norm,
            "numerical_rank": self.numerical_rank,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "energy_rank_90": self.energy_rank(0.90),
            "energy_rank_99": self.energy_rank(0.99),
        }


class Spectrum(SiteTable[SiteSpectrum]):
    """Site → `SiteSpectrum` of one adapter."""

    @property
    def parameters(self) -> int:
        """The number of values that the adapter holds, Σ r·(d + h)."""
        return sum(row.rank * sum(row.shape) for row in self.values())

    @property
    def norm(self) -> float:
        """√Σ‖ΔW‖²."""
        return sum(row.norm**2 for row in self.values()) ** 0.5

    def advised_ranks(self, share: float = 0.99, quantile: float = 0.9) -> dict[str, int]:
        """For each kind of matrix, the rank that keeps a share of the energy at most of its sites.

        All experts of a mixture of experts are one kind. Sites with a zero update are ignored; a kind that
        has only such sites is missing from the result.

        Args:
            share: of ‖ΔW‖².
            quantile: the share of the sites of a kind at which the rank must be sufficient; 1 for all sites.

        Raises:
            ConfigError: the share or the quantile is not in (0, 1].
        """
        check_number("a quantile", quantile, above=0, at_most=1)
        ranks: dict[str, list[int]] = {}
        grid = self.grid()
        kinds = kind_names(grid.matrices)
        for (_, matrix), site in grid.sites.items():
            if rank := self[site].energy_rank(share):
                ranks.setdefault(kinds[matrix], []).append(rank)
        return {
            kind: sorted(ranks[kind])[math.ceil(quantile * len(ranks[kind]) - 1e-9) - 1]
            for kind in dict.fromkeys(kinds.values())
            if kind in ranks
        }

    def totals(self) -> dict[str, Any]:
        """Size, norm and advised ranks."""
        return {"parameters": self.parameters, "norm": self.norm, "advised_ranks_99": self.advised_ranks()}


def spectrum(adapter: Adapter, base: Any = None, *, allow_different_base: bool = False) -> Spectrum:
    """The singular values of ΔW at every site, from the factors alone, in float64.

    ΔW = scale·U·V is never formed: U = Q_u·R_u, Vᵀ = Q_v·R_v, and the singular values are those of the core
    scale·R_u·R_vᵀ (r×r).

    Args:
        adapter: an adapter with low-rank updates.
        base: a Base, an nn.Module or a mapping site → W (d×h); only for the norms relative to ‖W‖.
        allow_different_base: skip the comparison with the fingerprint.

    Raises:
        ShapeError: an update has no factors, or a site is missing in the base or has another shape there.
        BaseMismatchError: the adapter belongs to another base, or is merged into this one.
        BaseLoadError: a weight contains NaN or infinity.

    >>> import torch
    >>> from brushstroke.lowrank import LowRank
    >>> U, V = torch.eye(4, 2), torch.diag(torch.tensor([3.0, 4.0]))
    >>> spectrum(Adapter({"fc": LowRank(U, V, scale=0.5)}))["fc"].sigma
    tensor([2.0000, 1.5000], dtype=torch.float64)
    """
    updates = low_rank_updates(adapter)
    norms: Mapping[str, float] = {}
    if base is not None:
        weights = walk(adapter, base, allow_different_base=allow_different_base)
        norms = {site: finite_norm(site, W) for site, _, W in weights}
    rows = {}
    for site, update in updates.items():
        parts = update.svd()
        rounding = product_rounding(*update.factors, parts).cpu()
        norm = float(parts.sigma.square().sum().sqrt())
        rows[site] = SiteSpectrum(
            update.shape, update.rank, parts.sigma.cpu(), norm, norms.get(site), rounding
        )
    return Spectrum(rows)
