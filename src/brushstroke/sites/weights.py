"""Maps sites to W (d×h) of a live model; copies are made of quantised weights only.

It changes no weight and reads no files (see `base.weights`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.errors import BaseLoadError, did_you_mean
from brushstroke.sites.kinds import dense_dxh
from brushstroke.sites.site import Site
from brushstroke.sites.walk import find_sites, site_module, unwrap


class ModelWeights(Mapping[str, Float[Tensor, "d h"]]):
    """The weights of a live model as views: torch's `Linear.weight` transposed, HF's `Conv1D.weight` as is.

    A weight that bitsandbytes has quantised is dequantised whenever it is read.

    Args:
        model: an nn.Module or a Base.

    >>> weights = ModelWeights(nn.Sequential(nn.Linear(3, 5)))
    >>> list(weights), tuple(weights["0"].shape)
    (['0'], (3, 5))
    """

    def __init__(self, model: Any) -> None:
        self._root = unwrap(model)
        self._sites = {site.path: site for site in find_sites(self._root, trial=False)}

    def __getitem__(self, site: str) -> Float[Tensor, "d h"]:
        W = dense_dxh(self._root.get_submodule(known_site(self._sites, site).path))
        if W is None:
            raise BaseLoadError(
                f"the weight of {site} is packed in a form that cannot be read; load the base unquantised"
            )
        return W.detach()

    def __contains__(self, site: object) -> bool:
        return site in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def sites(self) -> tuple[Site, ...]:
        """Every weight that can be read, in model order."""
        return tuple(self._sites.values())


def weights_of(base: Any) -> Mapping[str, Tensor]:
    """Site → W (d×h) of a Base or an nn.Module; a mapping is returned unchanged.

    Raises:
        BaseLoadError: it is none of these.
    """
    if isinstance(base, Mapping):
        return base
    root = base if isinstance(base, nn.Module) else getattr(base, "model", None)
    if isinstance(root, nn.Module):
        return ModelWeights(root)
    raise BaseLoadError(
        f"expected a base, a model or a mapping from sites to W (d×h); got a {type(base).__name__}"
    )


def plain_weights(root: nn.Module, sites: Mapping[str, Site]) -> dict[str, Float[Tensor, "d h"]]:
    """Site → W (d×h) for all sites whose weight can be read as a matrix, not on the meta device."""
    found = {path: dense_dxh(site_module(root, path)) for path in sites}
    return {path: W for path, W in found.items() if W is not None and W.device.type != "meta"}


def known_site(sites: Mapping[str, Site], path: str) -> Site:
    """The site of this path.

    Raises:
        KeyError: there is no such site; the message lists near misses.
    """
    if path not in sites:
        raise KeyError(f"the model has no site {path!r}{did_you_mean(path, sites)}")
    return sites[path]


def is_quantised(model: Any) -> bool:
    """Whether `load_base` or the model's config marks it as quantised."""
    root = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    marked = getattr(root, "brushstroke_quantised", False)
    return bool(marked) or getattr(getattr(root, "config", None), "quantization_config", None) is not None
