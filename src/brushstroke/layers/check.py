"""Does an adapter belong to this base? Sites, shapes, and the weights that its fingerprint knows.

It changes nothing in the model.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from brushstroke.adapter import Adapter, Other, Site, Verdict
from brushstroke.errors import AttachError, BaseMismatchError, ShapeError, did_you_mean
from brushstroke.layers.copies import Parameter, check_copies
from brushstroke.layers.walk import find_others, find_sites, site_module, unwrap, weight_dxh
from brushstroke.lowrank import LowRank, Update


class QuantisedBaseWarning(UserWarning):
    """The adapter is used on a quantised form of its base, or was trained on one."""


def check_base(
    model: Any,
    adapter: Adapter,
    *,
    allow_different_base: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    parameter: Parameter | None = None,
) -> None:
    """Check an adapter against a base: every site is there with its shape, and the weights are known.

    Args:
        model: an nn.Module or a Base (also one on the meta device, where `weights` is given).
        adapter: the adapter.
        allow_different_base: pass over the verdict of the fingerprint.
        weights: site → W (d×h) to judge by, instead of the model's own.
        parameter: name → a weight of any kind, instead of the model's own.

    Raises:
        ShapeError: sites that are missing or have other shapes, all of them listed.
        BaseMismatchError: another base, one that holds this adapter already, or other weights than the copies
            that the adapter's file holds.
    """
    root = unwrap(model)
    sites = {path: site for site in find_sites(root, trial=False) for path in site.paths}
    problems = []
    seen: dict[str, str] = {}
    others: dict[str, Other] = {}
    for path, update in adapter.items():
        if path in sites and (other := seen.setdefault(sites[path].path, path)) != path:
            problems.append(f"{path}: it is one module with {other}, and has two updates")
        if path not in sites:
            others = others or {other.path: other for other in find_others(root, list(sites.values()))}
            known = f"in the base it is {others[path].reason}" if path in others else None
            near = did_you_mean(path, sites, count=1)
            problems.append(f"{path}: {known or f'the base has no such site{near}'}")
        elif sites[path].bypassed:
            problems.append(f"{path}: {sites[path].bypassed}")
        elif sites[path].shape != update.shape:
            problems.append(f"{path}: the base's weight is {sites[path].shape}, the update {update.shape}")
    if problems:
        shown = "\n  ".join(problems[:10]) + (
            f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        )
        raise ShapeError(
            f"this adapter does not fit the base at {len(problems)} of {len(adapter)} sites:\n  {shown}"
        )
    if adapter.copies:
        own = parameter or dict(root.named_parameters(remove_duplicate=False)).get
        check_copies(adapter, own, allow_different_base=allow_different_base)
    fingerprint = adapter.card.fingerprint if adapter.card else None
    if fingerprint is None or allow_different_base:
        return
    if weights is None:
        weights = plain_weights(root, {path: sites[path] for path in fingerprint.samples if path in sites})
    sampled = [path for path in fingerprint.samples if path in weights and path in adapter]
    if not sampled:
        return
    # Weights read from files come one at a time, unless some of them must be left out.
    known = weights if len(sampled) == len(fingerprint.samples) else {path: weights[path] for path in sampled}
    verdict, difference = fingerprint.judge(known, _delta_reader(adapter), is_quantised(root))
    name = (adapter.card.base_name if adapter.card else None) or "unknown"
    if verdict is Verdict.MERGED:
        raise BaseMismatchError(
            "this adapter is merged into the base already; use the base as it is, or load the "
            "original weights "
            f"({name})"
        )
    if verdict is Verdict.FOREIGN:
        raise BaseMismatchError(
            f"this adapter was trained on another base ({name}): the weights differ by "
            f"{difference:.1%} at the sampled "
            "positions; load the right base, or allow a different one (--allow-different-base, "
            "allow_different_base=True)"
        )
    if verdict is Verdict.QUANTISED:
        warnings.warn(
            "the base is a quantised form of the one that this adapter was trained on "
            f"({difference:.1%} apart)",
            QuantisedBaseWarning,
            stacklevel=3,
        )


def canonical_path(path: str, sites: Mapping[str, Site]) -> str:
    """The first of the paths under which a shared module is known."""
    return path if path in sites else next(site.path for site in sites.values() if path in site.aliases)


def as_low_rank(path: str, update: Update) -> LowRank:
    """The update, if a linear layer can run it.

    Raises:
        AttachError: it is of another kind.
    """
    if not isinstance(update, LowRank):
        raise AttachError(f"{path}: a {type(update).__name__} cannot be attached to a linear layer yet")
    return update


def plain_weights(root: nn.Module, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Site → W (d×h) for all sites whose weight is stored as a plain matrix and is there at all."""
    found = {path: weight_dxh(site_module(root, path), site.kind) for path, site in sites.items()}
    return {path: W for path, W in found.items() if W is not None and W.device.type != "meta"}


def is_quantised(root: nn.Module) -> bool:
    """Whether the model is marked as quantised, by `load_base` or by its own config."""
    marked = getattr(root, "brushstroke_quantised", False)
    return bool(marked) or getattr(getattr(root, "config", None), "quantization_config", None) is not None


def _delta_reader(adapter: Adapter) -> Callable[[str, Tensor, Tensor], Tensor]:
    def read(path: str, i: Tensor, j: Tensor) -> Tensor:
        update = adapter[path]
        if isinstance(update, LowRank):
            U, V = update.U.to("cpu", torch.float64), update.V.to("cpu", torch.float64)
            return update.scale * (U[i] * V[:, j].mT).sum(-1)
        return update.dense()[i, j]

    return read
