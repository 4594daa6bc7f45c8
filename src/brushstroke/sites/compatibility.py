"""Checks that an adapter belongs to a base: sites, shapes, and the weights sampled in its fingerprint.

It changes nothing in the model.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from brushstroke.adapter import Adapter, Verdict
from brushstroke.errors import BaseMismatchError, ShapeError, did_you_mean
from brushstroke.sites.copies import Parameter, check_copies
from brushstroke.sites.site import Other, Site
from brushstroke.sites.walk import find_others, find_sites, unwrap
from brushstroke.sites.weights import is_quantised, plain_weights


class QuantisedBaseWarning(UserWarning):
    """The adapter is used with a quantised form of its base, or was trained on one."""


def check_base(
    model: Any,
    adapter: Adapter,
    *,
    allow_different_base: bool = False,
    weights: Mapping[str, Tensor] | None = None,
    parameter: Parameter | None = None,
) -> None:
    """Check an adapter against a base: it has every site with the right shape, and the fingerprint matches.

    Args:
        model: an nn.Module or a Base (on the meta device only if `weights` is given).
        adapter: the adapter.
        allow_different_base: accept an adapter whose fingerprint shows another base.
        weights: site → W (d×h) to compare, instead of the model's weights.
        parameter: name → a weight of any kind, instead of the model's weights.

    Raises:
        ShapeError: sites are missing or have other shapes; all of them are listed.
        BaseMismatchError: the base is another one, already contains this adapter, or has other weights than
            the copies in the adapter's file.
    """
    root = unwrap(model)
    sites = {path: site for site in find_sites(root, trial=False) for path in site.paths}
    problems = []
    seen: dict[str, str] = {}
    others: dict[str, Other] = {}
    for path, update in adapter.items():
        if path in sites and (other := seen.setdefault(sites[path].path, path)) != path:
            problems.append(f"{path}: it is the same module as {other}, but each has an update")
        if path not in sites:
            others = others or {other.path: other for other in find_others(root, list(sites.values()))}
            known = f"in the base it is {others[path].reason}" if path in others else None
            near = did_you_mean(path, sites, count=1)
            problems.append(f"{path}: {known or f'the base has no such site{near}'}")
        elif sites[path].bypassed:
            problems.append(f"{path}: {sites[path].bypassed}")
        elif not update.fits(sites[path].shape):
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
    if allow_different_base or not (adapter.card and adapter.card.fingerprint):
        return
    sampled = [path for path in adapter.card.fingerprint.samples if path in adapter]
    if weights is None:
        weights = plain_weights(root, {path: sites[path] for path in sampled})
    elif len(sampled) < len(adapter.card.fingerprint.samples):  # else pass on the mapping, which reads lazily
        weights = {path: weights[path] for path in sampled if path in weights}
    verdict, difference = check_fingerprint(adapter, weights, is_quantised(root))
    if verdict is Verdict.QUANTISED:
        warnings.warn(
            "the base is a quantised form of the one that this adapter was trained on "
            f"({difference:.1%} apart)",
            QuantisedBaseWarning,
            stacklevel=3,
        )


def check_fingerprint(
    adapter: Adapter, weights: Mapping[str, Tensor], quantised: bool
) -> tuple[Verdict, float]:
    """Compare W (d×h) of some sites with the samples on the adapter's card.

    Returns:
        The verdict, and the relative difference of all samples; SAME where there are none to compare.

    Raises:
        BaseMismatchError: the weights belong to another base, or already contain this adapter.
    """
    fingerprint = adapter.card.fingerprint if adapter.card else None
    if fingerprint is None or not any(path in weights for path in fingerprint.samples):
        return Verdict.SAME, 0.0

    def delta_at(path: str, i: Tensor, j: Tensor) -> Tensor:
        return adapter[path].entries(i, j, weights[path])

    verdict, difference = fingerprint.compare(weights, delta_at, quantised)
    name = (adapter.card.base_name if adapter.card else None) or "unknown"
    where = f"{next(iter(weights))}: " if len(weights) == 1 else ""
    if verdict is Verdict.MERGED:
        raise BaseMismatchError(
            f"{where}this adapter is already merged into the base; use the base without it, or load the "
            f"original weights ({name})"
        )
    if verdict is Verdict.FOREIGN:
        raise BaseMismatchError(
            f"{where}this adapter was trained on another base ({name}): the weights differ by "
            f"{difference:.1%} at the sampled positions; load the right base, or allow a different one "
            "(--allow-different-base, allow_different_base=True)"
        )
    return verdict, difference


def canonical_path(path: str, sites: Mapping[str, Site]) -> str:
    """The first path of a module that may have several paths."""
    return path if path in sites else next(site.path for site in sites.values() if path in site.aliases)
