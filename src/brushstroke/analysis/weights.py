"""The base's weights for an analysis: one tensor at a time, each checked against the adapter.

It keeps no weight and knows no file; a mapping that reads files lazily is as good as a live model.
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

OnSite = Callable[[str, int, int], None]  # the site that comes next, its number, and how many there are


def low_rank_updates(adapter: Adapter) -> dict[str, LowRank]:
    """Site → factors.

    Raises:
        ShapeError: sites whose update has no factors, all of them listed; factors that are not finite.
    """
    found = {site: update for site, update in adapter.items() if isinstance(update, LowRank)}
    others = [f"{site}: a {type(adapter[site]).__name__}" for site in adapter if site not in found]
    if others:
        raise ShapeError("only low-rank updates can be analysed; found\n  " + "\n  ".join(others))
    for site, update in found.items():
        if not (update.U.isfinite().all() and update.V.isfinite().all()):
            raise ShapeError(f"{site}: the factors hold NaN or infinity; such an update has no directions")
    return found


def walk(
    adapter: Adapter,
    base: Any,
    *,
    allow_different_base: bool = False,
    on_site: OnSite | None = None,
) -> Iterator[tuple[str, LowRank, Float[Tensor, "d h"]]]:
    """(site, update, W) for each site, W read when it is its turn.

    Raises:
        ShapeError: sites that the base lacks, all listed before anything is read, or a W of another shape.
        BaseMismatchError: by the fingerprint another base, or one that holds this adapter already.
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
                finite_norm(site, W)  # a damaged weight is the first thing to say
                raise
        yield site, update, W


def finite_norm(site: str, W: Float[Tensor, "d h"]) -> float:
    """‖W‖_F, in float64.

    Raises:
        BaseLoadError: W holds NaN or infinity.
    """
    norm = frobenius(W)
    if not math.isfinite(norm) and not W.isfinite().all():
        raise BaseLoadError(
            f"{site}: the base's weight holds NaN or infinity; get the model again from where it came"
        )
    return norm
