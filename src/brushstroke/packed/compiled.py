"""Compiles elementwise functions with torch.compile, so that a GPU runs one kernel instead of several.

Norms, rotations and activations define the functions; it has no model code, and compiles nothing on a CPU.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LEAST_NUMBERS = 4 * 1024 * 1024  # smallest size of the first input: below it, the kernel launch dominates
_compile = False  # whether compilation is requested
_fails = False  # whether compilation failed on this machine


@contextmanager
def compiled(on: bool) -> Iterator[None]:
    """Context manager: turn compiled functions for large GPU tensors on or off."""
    global _compile
    before, _compile = _compile, on
    try:
        yield
    finally:
        _compile = before


class CompiledFunction:
    """A function of tensors; the size and device of the first one decide whether it is compiled.

    Compilation takes seconds, once per kind of input. If it fails (no Triton, no C compiler), there is one
    warning, and the function runs uncompiled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, x: torch.Tensor, *inputs: Any) -> Any:
        """The value of the function."""
        if not pays(x) or torch.compiler.is_compiling():
            return self._function(x, *inputs)
        if self._compiled is None:
            self._compiled = torch.compile(self._function)
        try:
            return self._compiled(x, *inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            global _fails
            _fails = True
            warnings.warn(
                f"torch.compile does not work here ({' '.join(str(error).split())[:200]}); steps on this GPU "
                "are slower than they could be",
                stacklevel=2,
            )
            return self._function(x, *inputs)


def pays(x: torch.Tensor) -> bool:
    """Whether compilation is requested and works, and the tensor is large enough and on a GPU."""
    return _compile and not _fails and x.device.type == "cuda" and x.numel() >= LEAST_NUMBERS
