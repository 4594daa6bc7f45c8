"""The base's weights for an analysis: one tensor at a time, each checked against the adapter.

It keeps no weight and knows no file; a mapping that reads files lazily is as good as a live model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.adapter import Adapter, Verdict, is_conv1d
from brushstroke.errors import BaseLoadError, BaseMismatchError, ShapeError, did_you_mean
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.krylov import frobenius

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


def weights_of(base: Any) -> Mapping[str, Tensor]:
    """Site → W (d×h) of a mapping, which is taken as it is, a Base, or an nn.Module."""
    if isinstance(base, Mapping):
        return base
    root = base if isinstance(base, nn.Module) else getattr(base, "model", None)
    if isinstance(root, nn.Module):
        return _Live(root)
    raise BaseLoadError(
        f"expected a base, a model or a mapping from sites to W (d×h); got a {type(base).__name__}"
    )


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
        raise ShapeError(
            f"the base lacks {len(absent)} of {len(updates)} adapted sites; analyse an adapter with the base "
            "that it was trained on:\n  " + "\n  ".join(absent[:10])
        )
    quantised = bool(getattr(getattr(base, "model", base), "brushstroke_quantised", False))
    for number, (site, update) in enumerate(updates.items(), start=1):
        if on_site is not None:
            on_site(site, number, len(updates))
        W = weights[site].detach()
        if tuple(W.shape) != update.shape:
            raise ShapeError(
                f"{site}: W must be (d, h) = {update.shape}; the base's is {tuple(W.shape)} (torch's "
                "Linear.weight is the transpose)"
            )
        if not allow_different_base:
            _check(adapter, site, update, W, quantised)
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


def _check(adapter: Adapter, site: str, update: LowRank, W: Tensor, quantised: bool) -> None:
    fingerprint = adapter.card.fingerprint if adapter.card else None
    if fingerprint is None or site not in fingerprint.samples:
        return

    def delta_at(_: str, i: Tensor, j: Tensor) -> Tensor:
        U, V = update.U.to("cpu", torch.float64), update.V.to("cpu", torch.float64)
        return update.scale * (U[i] * V[:, j].mT).sum(-1)

    verdict, difference = fingerprint.judge({site: W}, delta_at, quantised)
    if verdict in (Verdict.MERGED, Verdict.FOREIGN):
        finite_norm(site, W)  # a damaged weight is told first
    if verdict is Verdict.MERGED:
        raise BaseMismatchError(
            f"{site}: this adapter is merged into the base already; analyse it with the original weights"
        )
    if verdict is Verdict.FOREIGN:
        raise BaseMismatchError(
            f"{site}: this adapter was trained on another base, whose weights differ by {difference:.1%}; "
            "give the right one, or allow a different one (--allow-different-base, allow_different_base=True)"
        )


class _Live(Mapping[str, Tensor]):
    """The weights of linear layers and HF Conv1D layers of a live model, as views."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = {
            path: module
            for path, module in root.named_modules()
            if isinstance(module, nn.Linear) or is_conv1d(module)
        }

    def __getitem__(self, site: str) -> Tensor:
        module = self._modules[site]
        weight = module.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
            raise BaseLoadError(f"the weight of {site} is packed (quantised); load the base unquantised")
        return weight.detach() if is_conv1d(module) else weight.detach().mT

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
