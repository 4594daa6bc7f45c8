"""A prefix that several passes of a step continue: computed once, its graph kept until all of them are over.

Keys and values are all that later tokens take from it, in a model that may run packed.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Keys = Float[Tensor, "1 kv p w"]
Values = Float[Tensor, "1 kv p u"]


@runtime_checkable
class KeyValueCache(Protocol):
    """Where the attention modules of a pass leave their keys and values, and find those that it continues."""

    def record(self, module: nn.Module, key: Keys, value: Values) -> None:
        """Take the keys and values of a pass's tokens."""
        ...

    def of(self, module: nn.Module) -> tuple[Keys, Values]:
        """The keys and values of the tokens that a pass continues."""
        ...


class PrefixCache:
    """The keys and values of a prefix, for each attention module.

    It records while its own pass runs. The passes that continue it see copies without a graph behind them, on
    which their gradients add up; `finish` takes those back through the prefix.
    """

    def __init__(self) -> None:
        self._recording = True
        self._made: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._copies: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(self, module: nn.Module, key: Keys, value: Values) -> None:
        """Take what an attention module made of the prefix; once closed, ignore what is computed again.

        Raises:
            ValueError: the module runs several times in one pass.
        """
        if not self._recording:
            return
        if module in self._made:
            raise ValueError("one attention module runs several times in a pass")
        self._made[module] = (key, value)

    def close(self) -> None:
        """The prefix's own pass is over."""
        self._recording = False
        self._copies = {module: (_copy(key), _copy(value)) for module, (key, value) in self._made.items()}

    def of(self, module: nn.Module) -> tuple[Keys, Values]:
        """Keys and values for a pass that continues the prefix."""
        return self._copies[module]

    def finish(self) -> None:
        """The backward pass of the prefix, with the gradients of all passes that continued it."""
        made = [tensor for pair in self._made.values() for tensor in pair]
        copies = [copy for pair in self._copies.values() for copy in pair]
        wanted = [(x, copy.grad) for x, copy in zip(made, copies, strict=True) if copy.grad is not None]
        self._made, self._copies = {}, {}
        if wanted:
            torch.autograd.backward([x for x, _ in wanted], [grad for _, grad in wanted])


def _copy(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)
