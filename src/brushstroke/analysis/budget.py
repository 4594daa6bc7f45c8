"""Chooses the ranks of a truncation, and computes its loss beforehand.

Does not compute spectra (`spectrum` does). Two rules: keep a share of the energy at every site, or make the
best use of a number of parameters over all sites.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.analysis.spectrum import SiteSpectrum, Spectrum
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.checks import check_one_rank
from brushstroke.errors import ConfigError
from brushstroke.lowrank import algebra


@dataclass(frozen=True)
class Truncation:
    """The rank of every site, and the size and the loss of the truncated adapter.

    Args:
        ranks: site → rank; the result omits sites of rank 0.
        parameters: the number of values in the result.
        parameters_before: the number of values in the adapter.
        loss: √Σ‖ΔW − truncated‖² over all sites (Eckart-Young: no update of these ranks is nearer).
        relative_loss: the loss divided by √Σ‖ΔW‖².
    """

    ranks: Mapping[str, int]
    parameters: int
    parameters_before: int
    loss: float
    relative_loss: float

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sites that the result omits."""
        return tuple(site for site, rank in self.ranks.items() if rank == 0)

    def derived(self) -> dict[str, Any]:
        """Values computed from the fields."""
        return {"left_out": list(self.left_out)}

    def apply(self, adapter: Adapter) -> Adapter:
        """The truncated adapter, in the dtype of `adapter`; its card keeps the fields that still hold."""
        updates = low_rank_updates(adapter)
        kept = {site: updates[site].truncate(rank) for site, rank in self.ranks.items() if rank}
        return adapter.derived(kept)


def keep_energy(found: Spectrum, share: float = 0.99) -> Truncation:
    """The smallest rank at every site that keeps this share of its energy ‖ΔW‖².

    The loss is at most √(1 − share) of the norm, at every site and over all sites.

    Raises:
        ConfigError: the share is not in (0, 1], or the adapter is zero everywhere.
    """
    return _truncation(found, {site: row.energy_rank(share) for site, row in found.items()})


def fit_budget(found: Spectrum, parameters: int) -> Truncation:
    """The ranks with the smallest total loss under a budget, by water-filling over the pooled σ².

    One rank at a site costs d + h parameters and reduces the squared loss by σ². The largest σ²/(d + h) is
    taken first, which is optimal if all sites have the same shape, and nearly optimal otherwise.

    Args:
        found: the spectrum.
        parameters: the maximum of Σ rank·(d + h).

    Raises:
        ConfigError: the budget is too small for a single rank, or the adapter is zero everywhere.
    """
    check_one_rank(parameters, {site: row.shape for site, row in found.items()})
    ranks, left = dict.fromkeys(found, 0), parameters
    queue = [(-_gain(row, 0), site) for site, row in found.items() if len(row.sigma)]
    heapq.heapify(queue)
    while queue:
        negative_gain, site = heapq.heappop(queue)
        row = found[site]
        if negative_gain == 0 or sum(row.shape) > left:
            continue  # later ranks of this site cost the same and reduce the loss by no more
        left -= sum(row.shape)
        ranks[site] += 1
        if ranks[site] < row.numerical_rank:
            heapq.heappush(queue, (-_gain(row, ranks[site]), site))
    return _truncation(found, ranks)


def _gain(row: SiteSpectrum, number: int) -> float:
    """By how much this rank reduces the squared loss, per parameter."""
    return float(row.sigma[number]) ** 2 / sum(row.shape)


def _truncation(found: Spectrum, ranks: Mapping[str, int]) -> Truncation:
    if not any(ranks.values()):
        raise ConfigError("the adapter is zero at every site, so it cannot be truncated; check the adapter")
    lost = sum(algebra.tail_norm(row.sigma, ranks[site]) ** 2 for site, row in found.items()) ** 0.5
    kept = sum(ranks[site] * sum(row.shape) for site, row in found.items())
    return Truncation(ranks, kept, found.parameters, lost, lost / found.norm)
