"""Ranks for a truncation, and the loss that is known before it.

Two rules: a share of the energy at every site, or the best use of a number of parameters over all sites.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.analysis.spectrum import SiteSpectrum, Spectrum
from brushstroke.analysis.weights import low_rank_updates
from brushstroke.errors import ConfigError
from brushstroke.lowrank import algebra


@dataclass(frozen=True)
class Truncation:
    """Ranks for every site, and what cutting to them does.

    Args:
        ranks: site → rank; a site of rank 0 is left out of the result.
        parameters: numbers that the result holds.
        parameters_before: those of the adapter.
        loss: √Σ‖ΔW − truncated‖² over all sites (Eckart-Young: no update of these ranks is nearer).
        relative_loss: the same divided by √Σ‖ΔW‖².
    """

    ranks: Mapping[str, int]
    parameters: int
    parameters_before: int
    loss: float
    relative_loss: float

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sites that the result does without."""
        return tuple(site for site, rank in self.ranks.items() if rank == 0)

    def derived(self) -> dict[str, Any]:
        """What follows from the fields."""
        return {"left_out": list(self.left_out)}

    def apply(self, adapter: Adapter) -> Adapter:
        """The truncated adapter, in the dtype of the given one; its card keeps what is still true."""
        updates = low_rank_updates(adapter)
        kept = {site: updates[site].truncate(rank) for site, rank in self.ranks.items() if rank}
        return adapter.derived(kept)


def keep_energy(found: Spectrum, share: float = 0.99) -> Truncation:
    """At every site the smallest rank that keeps this share of its energy ‖ΔW‖².

    The loss is at most √(1 − share) of the norm, at every site and over all.

    Raises:
        ConfigError: the share is not in (0, 1], or the adapter is zero everywhere.
    """
    return _truncation(found, {site: row.energy_rank(share) for site, row in found.items()})


def fit_budget(found: Spectrum, parameters: int) -> Truncation:
    """The ranks with the smallest total loss under a budget, by water-filling over the pooled σ².

    A rank at a site costs d + h numbers and saves σ² of the squared loss. The best σ²/(d + h) is taken first,
    which is optimal where all sites have one shape, and near it otherwise.

    Args:
        found: the spectrum.
        parameters: the largest Σ rank·(d + h).

    Raises:
        ConfigError: the budget does not pay for a single rank.
    """
    cheapest = min(sum(row.shape) for row in found.values())
    if parameters < cheapest:
        raise ConfigError(
            f"a budget of {parameters:,} parameters pays for no rank; the cheapest costs {cheapest:,}"
        )
    ranks, left = dict.fromkeys(found, 0), parameters
    queue = [(-_gain(row, 0), site) for site, row in found.items() if len(row.sigma)]
    heapq.heapify(queue)
    while queue:
        negative_gain, site = heapq.heappop(queue)
        row = found[site]
        if negative_gain == 0 or sum(row.shape) > left:
            continue  # its later ranks cost the same and save no more
        left -= sum(row.shape)
        ranks[site] += 1
        if ranks[site] < row.numerical_rank:
            heapq.heappush(queue, (-_gain(row, ranks[site]), site))
    return _truncation(found, ranks)


def _gain(row: SiteSpectrum, number: int) -> float:
    """What this rank saves of the squared loss for each number that it costs."""
    return float(row.sigma[number]) ** 2 / sum(row.shape)


def _truncation(found: Spectrum, ranks: Mapping[str, int]) -> Truncation:
    if not any(ranks.values()):
        raise ConfigError("the adapter is zero at every site; there is nothing to keep")
    lost = sum(algebra.tail_norm(row.sigma, ranks[site]) ** 2 for site, row in found.items()) ** 0.5
    held = sum(ranks[site] * sum(row.shape) for site, row in found.items())
    return Truncation(ranks, held, found.parameters, lost, lost / found.norm)
