"""The checker of tensor shapes for pytest --jaxtyping-packages=brushstroke,shapes.checked.

It checks only functions whose arguments or results are tensors with named axes. Other functions are not
checked, because tests pass settings of wrong types to see the library's own errors.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, _decorator

CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float here, as it is to Python's type checkers


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked, if any of them has named axes."""
    if not any(map(_has_axes, getattr(function, "__annotations__", {}).values())):
        return function
    checks = beartype(conf=CONF)(function)

    @functools.wraps(function)
    def with_axes(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _jaxtyped("context"):  # the sizes of this call's axes
            return checks(*args, **kwargs)

    return with_axes


def _has_axes(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(map(_has_axes, get_args(annotation)))


def _decorated(function: Any = _decorator._sentinel, *, typechecker: Any = _decorator._sentinel) -> Any:
    """What jaxtyping's import hook makes of a function; of classes and properties, what `jaxtyped` makes."""
    return (
        typechecker(function)
        if inspect.isfunction(function)
        else _jaxtyped(function, typechecker=typechecker)
    )


# `jaxtyped` wraps every function, binds its arguments in each call, and checks them twice; in a suite of many
# small calls that took a third of the time.
_jaxtyped = jaxtyping.jaxtyped
jaxtyping.jaxtyped = _decorator.jaxtyped = _decorated
