"""Memory that passes use again and again: fresh pages would cost more than the operations that fill them.

What is taken is good until the same name is taken again, by one thread. Nothing that a backward pass needs
may stay in it.
"""

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow to the largest size that was asked for."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, like: Tensor) -> Tensor:
        """Room for rows×width numbers of `like`'s dtype and device, not initialised."""
        memory, needed = self._memory.get(name), rows * width
        if (
            memory is None
            or memory.numel() < needed
            or (memory.dtype, memory.device) != (like.dtype, like.device)
        ):
            self._memory.pop(name, None)
            with torch.inference_mode(False):  # memory from inside it could not be written to outside
                memory = torch.empty(needed, dtype=like.dtype, device=like.device)
            self._memory[name] = memory
        return memory[:needed].view(rows, width)
