"""Trains W itself at chosen sites of a live model, and restores the original weights at the end.

For low-rank updates, see `attach`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from brushstroke.adapter import Adapter, Card, LoraConfig
from brushstroke.errors import AttachError, ConfigError
from brushstroke.layers.attach import Attachment, _freeze, _on_base
from brushstroke.layers.probe import require_unattached
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.matmul import HALF
from brushstroke.sites import (
    KINDS,
    Site,
    TargetPlan,
    find_others,
    find_sites,
    resolve_targets,
    site_module,
    unwrap,
    weight_dxh,
)

_MARK = "_brushstroke_in_training"  # an attribute of the weights that are trained


@dataclass(frozen=True)
class FullFineTuning:
    """The request to train W itself at the sites that `targets` select, as in `LoraConfig`."""

    targets: str | tuple[str, ...] = "all-linear"


class FullAttachment:
    """Trained weights in a model, with the methods of `Attachment`; a context manager that detaches them.

    Made by `attach_full`. The original weights are kept unchanged, and `detach` restores them.
    """

    has_dropout = False

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], plan: TargetPlan, card: Card) -> None:
        self.model, self.plan, self.card = model, plan, card
        self._sites = dict(sites)
        self._modules = {path: site_module(model, path) for path in sites}
        self._base = {path: _plain_weight(path, module) for path, module in self._modules.items()}
        trained = {path: nn.Parameter(weight.detach().clone()) for path, weight in self._base.items()}
        for weight in trained.values():
            setattr(weight, _MARK, True)
        self._put(trained)
        self._unfreeze = _freeze(model, set(map(id, trained.values())))

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the sites."""
        return tuple(self._modules)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Path → module."""
        return MappingProxyType(self._modules)

    @property
    def attached(self) -> bool:
        """Whether the trained weights are still in the model."""
        return bool(self._modules)

    @property
    def widest(self) -> int:
        """The largest output width of a site."""
        return max(site.h for site in self._sites.values())

    def train(self, mode: bool = True) -> None:
        """Does nothing, because W has no dropout."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained weights, for an optimiser."""
        for _, weight in self.named_parameters():
            yield weight

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, weight) pairs, such as ("fc1.weight", …)."""
        for path, module in self._modules.items():
            yield f"{path}.weight", cast(nn.Parameter, module.weight)

    def adapter(self, card: Card | None = None) -> Adapter:
        """ΔW of every site as factors of full rank min(d, h), in float32."""
        self._check_attached()
        updates = {path: self._update(path, site) for path, site in self._sites.items()}
        return Adapter(updates, card or self.card)

    def _update(self, path: str, site: Site) -> LowRank:
        weight = cast(nn.Parameter, self._modules[path].weight)
        delta = (weight.detach().double() - self._base[path].detach().double()).cpu()
        left, sigma, right = torch.linalg.svd(KINDS[site.kind].to_dxh(delta), full_matrices=False)
        root = sigma.sqrt()
        return LowRank((left * root).float(), (root[:, None] * right).float())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager: the model computes exactly what its base computes, bit for bit."""
        self._check_attached()
        trained = dict(zip(self._modules, self.parameters(), strict=True))
        self._put(self._base)
        try:
            yield
        finally:
            self._put(trained)

    @contextmanager
    def recorded(self) -> Iterator[set[object]]:
        """Context manager: collect the members of `modules` that run."""
        self._check_attached()
        ran: set[object] = set()

        def watch(module: nn.Module, _: Any) -> None:
            ran.add(module)

        handles = [module.register_forward_pre_hook(watch) for module in self._modules.values()]
        try:
            yield ran
        finally:
            for handle in handles:
                handle.remove()

    def detach(self) -> None:
        """Restore the base's weights and flags as they were before `attach_full`.

        Raises:
            AttachError: it is already detached.
        """
        self._check_attached()
        self._put(self._base)
        self._unfreeze()
        self._modules.clear()

    def __enter__(self) -> "FullAttachment":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.attached:
            self.detach()

    def _put(self, weights: Mapping[str, nn.Parameter]) -> None:
        for path, weight in weights.items():
            self._modules[path]._parameters["weight"] = weight

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("this attachment was detached already; attach it again")


TrainableAttachment = Attachment | FullAttachment


def attach_full(model: Any, what: FullFineTuning) -> FullAttachment:
    """Make W trainable at the chosen sites, and freeze the rest; detaching restores the base's flags.

    A weight that is tied to another module is trained only for this site.

    Args:
        model: an nn.Module or a Base, in float32 or float64.
        what: selects the sites.

    Raises:
        TargetError: a target pattern matches nothing.
        AttachError: the model has an adapter attached, or a weight is already being trained.
        ConfigError: a weight is in half precision, which would round small updates to 0, or is stored in a
            packed form.
    """
    root = unwrap(model)
    require_unattached(root)
    known = find_sites(root)
    request = LoraConfig(rank=1, targets=what.targets)
    plan = resolve_targets(request, known, find_others(root, known))
    chosen = {site.path: site for site in known if site.path in plan.ranks}
    return FullAttachment(root, chosen, plan, _on_base(Card(), root, chosen, getattr(model, "name", None)))


def _plain_weight(path: str, module: nn.Module) -> nn.Parameter:
    """W of a site, if it can be trained.

    Raises:
        AttachError: it is already being trained.
        ConfigError: it is stored in a packed form, or in half precision.
    """
    if weight_dxh(module) is None or "weight" not in module._parameters:
        raise ConfigError(f"the weight of {path} is stored in a packed form and cannot be trained itself")
    weight = cast(nn.Parameter, module.weight)
    if hasattr(weight, _MARK):
        raise AttachError(f"the weight of {path} is in training already; detach that attachment first")
    if weight.dtype in HALF:
        raise ConfigError(
            f"training W itself needs float32, and {path} is in {str(weight.dtype).removeprefix('torch.')}; "
            "load the base in float32 (--dtype float32), or train no W itself (in a study: --no-whole)"
        )
    return weight
