"""Attaches one adapter to a live model, and detaches it so that the model is restored bit for bit.

For several adapters in one model, see `bank`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from brushstroke.adapter import Adapter, Card, LoraConfig
from brushstroke.adapter.fingerprint import Fingerprint
from brushstroke.errors import AttachError, ConfigError
from brushstroke.layers.adapted import Attached, restore_classes, swap_class
from brushstroke.layers.fresh import Start
from brushstroke.layers.probe import block_bypasses, probe, require_unattached
from brushstroke.layers.registry import variant_named, variant_of
from brushstroke.layers.route import Route
from brushstroke.lowrank import Update
from brushstroke.sites import (
    Site,
    TargetPlan,
    canonical_path,
    check_base,
    find_others,
    find_sites,
    is_quantised,
    plain_weights,
    resolve_targets,
    site_module,
    unwrap,
)
from brushstroke.sites.quantised import keep_packing
from brushstroke.sites.targets import short_names


class Attachment:
    """One adapter in a model; a context manager that detaches it at the end.

    Made by `attach`. `model` is the module that contains it, `plan` the resolved targets of a new adapter,
    `card` the record of its origin.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, Attached],
        card: Card | None,
        plan: TargetPlan | None,
        route: Route,
        undo: list[Callable[[], None]],
    ) -> None:
        self.model = model
        self.plan = plan
        self.card = card
        self._modules = dict(modules)
        self._route = route
        self._undo = undo

    def __repr__(self) -> str:
        name = type(self.model).__name__
        if not self.attached:
            return f"Attachment(detached from {name})"
        trained = sum(p.numel() for module in self._modules.values() for p in module.factors().values())
        return f"Attachment({len(self._modules)} sites of {name}, {trained:,} parameters)"

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the adapted sites."""
        return tuple(self._modules)

    @property
    def modules(self) -> Mapping[str, Attached]:
        """Path → adapted module."""
        return MappingProxyType(self._modules)

    @property
    def attached(self) -> bool:
        """Whether the adapter is still in the model."""
        return bool(self._modules)

    @property
    def widest(self) -> int:
        """The largest output width of an adapted site."""
        return max(module.widths[1] for module in self._modules.values())

    @property
    def has_dropout(self) -> bool:
        """Whether there is dropout on the low-rank path."""
        return any(module.dropout for module in self._modules.values())

    def train(self, mode: bool = True) -> None:
        """Switch the dropout of the low-rank path on or off; the base's dropout does not change."""
        for module in self._modules.values():
            module.training = mode

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors, for an optimiser, site by site."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, factor) pairs, such as ("fc1.lora_V", …)."""
        for path, module in self._modules.items():
            for name, factor in module.factors().items():
                yield f"{path}.{name}", factor

    def adapter(self, card: Card | None = None) -> Adapter:
        """A copy of the current adapter; later training does not change it."""
        self._check_attached()
        updates = {path: module.update() for path, module in self._modules.items()}
        return Adapter(updates, card or self.card)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager: the model computes exactly what its base computes, bit for bit."""
        self._check_attached()
        restore = self._route.set((0,))
        try:
            yield
        finally:
            restore()

    @contextmanager
    def recorded(self) -> Iterator[set[object]]:
        """Context manager: collect the members of `modules` that run with the adapter."""
        self._check_attached()
        with self._route.recorded() as ran:
            yield ran

    def detach(self) -> None:
        """Remove the adapter: restore classes, parameters, buffers and flags as they were before `attach`.

        Raises:
            AttachError: it is already detached, or other code changed a module's class since.
        """
        self._check_attached()
        restore_classes(self._modules)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._modules.clear()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.attached:
            self.detach()

    def _check_attached(self) -> None:
        if not self.attached:
            raise AttachError("this attachment was detached already; attach the adapter again")


def attach(
    model: Any,
    what: Adapter | LoraConfig,
    *,
    trainable: bool = False,
    seed: int = 0,
    dropout: float | None = None,
    allow_different_base: bool = False,
) -> Attachment:
    """Attach an adapter, or a new one made from a config, to a model; it takes effect at once.

    The class of each adapted module is swapped for a subclass whose forward is x·W + scale·(x·U)·V. No module
    is wrapped, no hook is installed and no base weight changes. A new adapter starts with V = 0 (embeddings:
    U = 0), so that the model computes exactly what it did before.

    Args:
        model: an nn.Module or a Base.
        what: an adapter, or the config of a new one.
        trainable: freeze the base and give the factors gradients; detaching restores the base's flags.
        seed: for the starting factors of a new adapter.
        dropout: on the low-rank path; by default that of the config.
        allow_different_base: attach even if the fingerprint shows that the adapter belongs to another base.

    Raises:
        TargetError: a target pattern matches nothing, or a rank does not fit.
        BaseMismatchError: the adapter belongs to another base, or is already merged into this one.
        ShapeError: sites are missing or have other shapes.
        AttachError: a site already has an adapter, or cannot have one.
        ConfigError: dropout is not in [0, 1), or the config's variant cannot adapt a site.
    """
    root = unwrap(model)
    keep_packing(root)
    require_unattached(root)
    if dropout is not None and not 0 <= dropout < 1:
        raise ConfigError(f"dropout must be at least 0 and below 1; got {dropout!r}")
    sites = {site.path: site for site in find_sites(root, trial=isinstance(what, LoraConfig))}
    plan: TargetPlan | None = None
    if isinstance(what, LoraConfig):
        plan = resolve_targets(what, list(sites.values()), find_others(root, list(sites.values())))
        card = _new_card(root, sites, what, plan, getattr(model, "name", None))
        updates = _fresh_updates(root, sites, what, plan, seed)
        dropout = what.dropout if dropout is None else dropout
    elif isinstance(what, Adapter):
        check_base(root, what, allow_different_base=allow_different_base)
        updates = {canonical_path(path, sites): update for path, update in what.items()}
        card = what.card
        if trainable:  # the trained adapter belongs to this base
            name = getattr(model, "name", None) or (card.base_name if card else None)
            card = _on_base(card or Card(), root, {path: sites[path] for path in updates}, name)
    else:
        raise AttachError(f"expected an Adapter or a LoraConfig; got {type(what).__name__}")

    undo: list[Callable[[], None]] = []
    modules: dict[str, Attached] = {}
    route = Route((1,))
    try:
        for path, update in updates.items():
            variant = variant_of(path, update, sites[path].kind)
            module = modules[path] = swap_class(site_module(root, path), path, variant.attached, route)
            module.install(update, trainable=trainable, dropout=dropout or 0.0)
        undo += block_bypasses(root, modules)
        probe(modules)
    except BaseException:
        restore_classes(modules)
        for step in reversed(undo):
            step()
        raise
    if trainable:
        factors = {id(p) for module in modules.values() for p in module.factors().values()}
        undo.append(_freeze(root, factors))
    return Attachment(root, modules, card, plan, route, undo)


def _fresh_updates(
    root: nn.Module, sites: Mapping[str, Site], config: LoraConfig, plan: TargetPlan, seed: int
) -> dict[str, Update]:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for path, rank in plan.ranks.items():
        start = Start(config, sites[path], site_module(root, path), rank, plan.scales[path], generator)
        updates[path] = variant_named(config.variant, sites[path]).fresh(start)
    return updates


def _freeze(root: nn.Module, factors: set[int]) -> Callable[[], None]:
    before = [(p, p.requires_grad) for p in root.parameters() if id(p) not in factors]
    for parameter, _ in before:
        parameter.requires_grad_(False)

    def restore() -> None:
        for parameter, flag in before:
            parameter.requires_grad_(flag)

    return restore


def _new_card(
    root: nn.Module, sites: Mapping[str, Site], config: LoraConfig, plan: TargetPlan, base_name: str | None
) -> Card:
    chosen = {path: sites[path] for path in plan.ranks}
    return _on_base(Card(lora=config.as_dict()), root, chosen, base_name)


def _on_base(card: Card, root: nn.Module, chosen: Mapping[str, Site], base_name: str | None) -> Card:
    """The card of an adapter for these sites of this base."""
    weights = plain_weights(root, chosen)
    return card.with_changes(
        base_name=base_name,
        target_modules=short_names(chosen, [path for path, _ in root.named_modules()]),
        fingerprint=Fingerprint.of(weights, is_quantised(root)) if weights else None,
        conv1d=all(site.kind == "conv1d" for site in chosen.values()),
    )
