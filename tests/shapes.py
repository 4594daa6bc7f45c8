"""The checker of tensor shapes for pytest --jaxtyping-packages=brushstroke,shapes.checked.

It checks the functions that take or give tensors with named axes, and leaves the others alone: what a setting
of the wrong type does is for the tests to see, not for a checker to hide.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float here, as it is to Python's type checkers


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked, if any of them has named axes."""
    annotations = getattr(function, "__annotations__", {}).values()
    return beartype(conf=CONF)(function) if any(map(_has_axes, annotations)) else function


def _has_axes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_axes, get_args(annotation)))
