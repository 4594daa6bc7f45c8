"""The interface of all adapted layers, and the class swap that turns a module into one.

It uses no hooks and no wrapper modules; each kind of layer has its own file with the forward passes.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from brushstroke.errors import AttachError
from brushstroke.layers.route import Route
from brushstroke.lowrank import Update
from brushstroke.lowrank.apply import LinearParts
from brushstroke.sites import Kind, require_kind


class Trial(NamedTuple):
    """An update to try in an adapted layer, and the expected output.

    Args:
        tensors: parameters and buffers for the trial, by name.
        settings: other attributes for the trial, by name.
        expected: the output with slot 1.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    expected: Tensor


class Adapted(nn.Module):
    """A layer with one or several adapters: its original class, its kind, and the route of all sites."""

    weight: Tensor
    bias: Tensor | None
    _route: Route
    _site: str  # its path
    _base_class: ClassVar[type[nn.Module]]
    _kind: ClassVar[Kind]
    _plain: ClassVar[bool]  # whether the base class has the standard forward of its kind
    _added: ClassVar[tuple[str, ...]]  # the attributes that an adapter adds in addition to the route

    @property
    def widths(self) -> tuple[int, int]:
        """(d, h) of the base's weight W."""
        return self._kind.shape(self)

    def parts(self, x: Tensor) -> LinearParts | None:
        """The tensors with which a fused function runs this layer on x; None if the layer must be called."""
        return None

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        """A random update for a probe.

        Args:
            x: an input of the layer.
            base: its output without an adapter.
            generator: for the update.
        """
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapted":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AttachError(
            "a model with an adapter in it cannot be pickled; save only the adapter with "
            "brushstroke.save(), or detach it first"
        )


class Attached(Adapted):
    """A layer with one adapter, in slot 1 of the route."""

    dropout: float

    def install(self, update: Any, *, trainable: bool, dropout: float) -> None:
        """Store an update as parameters of the layer.

        Args:
            update: of the type that the registry lists for this class.
            trainable: store it in at least fp32, and give it gradients.
            dropout: probability on the input of the low-rank path, while the layer trains.
        """
        raise NotImplementedError

    def factors(self) -> Mapping[str, nn.Parameter]:
        """The trained parameters, by name."""
        raise NotImplementedError

    def update(self) -> Update:
        """A copy of the current update."""
        raise NotImplementedError


class Banked(Adapted):
    """A layer with several adapters, in the slots of the route."""

    @classmethod
    def fits(cls, update: Any, module: nn.Module) -> bool:
        """Whether all numbers of an update are finite in the dtype in which this module would store them."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Allocate slots; all of them are empty."""
        raise NotImplementedError

    def write(self, slot: int, update: Any) -> None:
        """Write an update, of the type that the registry lists for this class, to a slot; None empties it."""
        raise NotImplementedError


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks, so that it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@cache
def adapted_class(base: type[nn.Module], mixin: type[Adapted], kind: Kind) -> type[Adapted]:
    """The subclass `mixin + base`, made once for each pair."""
    added = {"_base_class": base, "_kind": kind, "_plain": kind.is_plain(base), "__module__": __name__}
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), added)


MixinT = TypeVar("MixinT", bound=Adapted)


def swap_class(module: nn.Module, path: str, mixin: type[MixinT], route: Route) -> MixinT:
    """Swap the class of a module for its adapted subclass, in place, and return the module.

    Raises:
        AttachError: the object has its own forward attribute, which would bypass the new class.
    """
    if "forward" in module.__dict__:
        raise AttachError(
            f"{path} has its own forward attribute (offload and device-map hooks set one), which would "
            "silently bypass the adapter; load the model without device_map offloading, or remove the hooks "
            "first"
        )
    module.__class__ = adapted_class(type(module), mixin, require_kind(module))
    module.__dict__.update(_route=route, _site=path)
    return cast(MixinT, module)


def restore_classes(modules: Mapping[str, Adapted]) -> None:
    """Restore the classes that modules had before `swap_class`, and remove the attributes of the adapter.

    Raises:
        AttachError: other code changed a class since; then nothing is changed.
    """
    changed = [path for path, module in modules.items() if not _has_swapped_class(module)]
    if changed:
        found = type(modules[changed[0]]).__name__
        raise AttachError(
            f"other code changed the class of {', '.join(changed)} since the adapter was attached "
            f"(it is now {found}); undo that change first"
        )
    for module in modules.values():
        for name in module._added:
            if hasattr(module, name):
                delattr(module, name)
        del module.__dict__["_route"], module.__dict__["_site"]
        plain = cast(nn.Module, module)
        plain.__class__ = module._base_class


def _has_swapped_class(module: nn.Module) -> bool:
    return "_base_class" in type(module).__dict__  # not inherited: the class that `adapted_class` made
