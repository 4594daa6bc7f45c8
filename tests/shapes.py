"""The checker of tensor shapes for pytest --jaxtyping-packages=brushstroke,shapes.checked.

It checks only functions whose arguments or results are tensors with named axes. Other functions are not
checked, because tests pass settings of wrong types to see the library's own errors.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, _decorator

CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float here, as it is to Python's type checkers


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked, if any of them has named axes."""
    return beartype(conf=CONF)(function) if any(map(_has_axes, _annotations(function))) else function


def _annotations(function: Callable[..., Any]) -> Iterable[Any]:
    return getattr(function, "__annotations__", {}).values()


def _has_axes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_axes, get_args(annotation)))


_jaxtyped = _decorator.jaxtyped


def _jaxtyped_with_axes(function: Any = _decorator._sentinel, *, typechecker: Any) -> Any:
    """`jaxtyped`, which leaves a function as it is if the checker would."""
    if not inspect.isfunction(function):  # a class, a property, or the decorator without its function
        return _jaxtyped(function, typechecker=typechecker)
    quoted = any(isinstance(annotation, str) for annotation in _annotations(function))
    checks = quoted or any(map(_has_axes, _annotations(function)))
    return _jaxtyped(function, typechecker=typechecker) if checks else function


# jaxtyping's import hook wraps every function, and its wrapper binds the arguments of every call.
# For functions without axes, that took a third of the suite's time.
jaxtyping.jaxtyped = _decorator.jaxtyped = _jaxtyped_with_axes
