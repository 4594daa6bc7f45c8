"""A prefix cache for training: several passes of a step continue one prefix, which is computed only once.

It holds only keys and values: in a model that may run packed, later tokens use nothing else of the prefix.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Keys = Float[Tensor, "1 kv p w"]
Values = Float[Tensor, "1 kv p u"]


@runtime_checkable
class KeyValueCache(Protocol):
    """Stores the keys and values of attention modules for later passes that continue these tokens."""

    def record(self, module: nn.Module, key: Keys, value: Values) -> None:
        """Store the keys and values of a pass's tokens."""
        ...

    def of(self, module: nn.Module) -> tuple[Keys, Values]:
        """The keys and values of the tokens that a pass continues."""
        ...


class PrefixCache:
    """The keys and values of a prefix, for each attention module.

    It records while the prefix runs. Later passes attend to detached copies; their gradients accumulate
    there, and `finish` propagates them through the prefix. The prefix's graph stays in memory until then.
    """

    def __init__(self) -> None:
        self._recording = True
        self._made: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._copies: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(self, module: nn.Module, key: Keys, value: Values) -> None:
        """Store a module's keys and values of the prefix; after `close`, ignore recomputed ones.

        Raises:
            ValueError: the module runs several times in one pass.
        """
        if not self._recording:
            return
        if module in self._made:
            raise ValueError("one attention module runs several times in a pass")
        self._made[module] = (key, value)

    def close(self) -> None:
        """End the recording; from now on, `of` returns detached copies."""
        self._recording = False
        self._copies = {module: (_copy(key), _copy(value)) for module, (key, value) in self._made.items()}

    def of(self, module: nn.Module) -> tuple[Keys, Values]:
        """Keys and values for a pass that continues the prefix."""
        return self._copies[module]

    def finish(self) -> None:
        """Run the backward pass of the prefix with the gradients of all passes that continued it."""
        made = [tensor for pair in self._made.values() for tensor in pair]
        copies = [copy for pair in self._copies.values() for copy in pair]
        wanted = [(x, copy.grad) for x, copy in zip(made, copies, strict=True) if copy.grad is not None]
        self._made, self._copies = {}, {}
        if wanted:
            torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])


def _copy(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)
