"""Reads the base's weights for an analysis, one tensor at a time, and checks each against the adapter.

Does not keep weights and does not open files; accepts a live model or a mapping that reads files lazily.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.checks import lacking, misshapen
from brushstroke.errors import BaseLoadError, BaseMismatchError, ShapeError, did_you_mean
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.krylov import frobenius
from brushstroke.sites import check_fingerprint, is_quantised, weights_of

OnSite = Callable[[str, int, int], None]  # the next site, its number (from 1), the number of sites


def low_rank_updates(adapter: Adapter) -> dict[str, LowRank]:
    """Site → low-rank update.

    Raises:
        ShapeError: there are other updates, or factors contain non-finite
            values.
    """
    updates = {site: update for site, update in adapter.items() if isinstance(update, LowRank)}
    others = {type(adapter[site]).__name__ for site in adapter if site not in updates}
    if others:
        raise ShapeError(
            f"an analysis needs ΔW = scale·U·V; {len(adapter) - len(updates)} of {len(adapter)} sites have "
            f'another update ({", ".join(sorted(others))}); analyse an adapter of the variant "lora", or the '
            "matrices that update.dense(W) gives"
        )
    for site, update in updates.items():
        if not (update.U.isfinite().all() and update.V.isfinite().all()):
            raise ShapeError(f"{site}: the factors contain NaN or infinity; such an update has no directions")
    return updates


def walk(
    adapter: Adapter,
    base: Any,
    *,
    allow_different_base: bool = False,
    on_site: OnSite | None = None,
) -> Iterator[tuple[str, LowRank, Float[Tensor, "d h"]]]:
    """Yield (site, update, W) for each site; each W is read when its site is reached.

    Raises:
        ShapeError: sites are missing in the base (checked before any W is read; the message lists all), or a
            W has another shape.
        BaseMismatchError: by the fingerprint, this is another base, or the adapter is merged into it.
        BaseLoadError: the fingerprint differs and W contains NaN or infinity.
    """
    updates, weights = low_rank_updates(adapter), weights_of(base)
    absent = [f"{site}{did_you_mean(site, weights, count=1)}" for site in updates if site not in weights]
    if absent:
        raise lacking(absent, len(updates))
    quantised = is_quantised(base)
    for number, (site, update) in enumerate(updates.items(), start=1):
        if on_site is not None:
            on_site(site, number, len(updates))
        W = weights[site].detach()
        if tuple(W.shape) != update.shape:
            raise misshapen(site, update.shape, tuple(W.shape))
        if not allow_different_base:
            try:
                check_fingerprint(adapter, {site: W}, quantised)
            except BaseMismatchError:
                finite_norm(site, W)  # report a damaged weight first
                raise
        yield site, update, W


def finite_norm(site: str, W: Float[Tensor, "d h"]) -> float:
    """‖W‖_F, in float64.

    Raises:
        BaseLoadError: W contains NaN or infinity.
    """
    norm = frobenius(W)
    if not math.isfinite(norm) and not W.isfinite().all():
        raise BaseLoadError(f"{site}: the base's weight contains NaN or infinity; download the model again")
    return norm
