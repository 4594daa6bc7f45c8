"""Memory that passes reuse: new pages would cost more time than the operations that fill them.

A buffer is valid until the same name is taken again; only one thread may use it. It must not hold tensors
that a backward pass needs.
"""

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow to the largest requested size."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, like: Tensor) -> Tensor:
        """A buffer of rows×width numbers of `like`'s dtype and device, not initialised."""
        memory, needed = self._memory.get(name), rows * width
        if (
            memory is None
            or memory.numel() < needed
            or (memory.dtype, memory.device) != (like.dtype, like.device)
        ):
            self._memory.pop(name, None)
            with torch.inference_mode(False):  # memory made in inference mode could not be written outside it
                memory = torch.empty(needed, dtype=like.dtype, device=like.device)
            self._memory[name] = memory
        return memory[:needed].view(rows, width)
