"""Elementwise work as one GPU kernel in place of several, by torch.compile; elsewhere as it is written.

It knows no model: norms, rotations and activations say what there is to compute.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LEAST_NUMBERS = 4 * 1024 * 1024  # of the first input: below it launching takes longer than computing
_compile = False  # whether it is asked for
_fails = False  # whether it was tried, and cannot be done here


@contextmanager
def compiled(on: bool) -> Iterator[None]:
    """Inside, large tensors on a GPU take the compiled functions, or not."""
    global _compile
    before, _compile = _compile, on
    try:
        yield
    finally:
        _compile = before


class CompiledFunction:
    """A function of tensors, the first of which decides whether it is compiled.

    Compiling takes seconds, once for a kind of input. Where it cannot be done (no Triton, no C compiler) a
    warning says so, once, and the function runs as written.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, x: torch.Tensor, *inputs: Any) -> Any:
        """What the function gives."""
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
    """Whether it is asked for and works, and a tensor is large enough and on a GPU."""
    return _compile and not _fails and x.device.type == "cuda" and x.numel() >= LEAST_NUMBERS
