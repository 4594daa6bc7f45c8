"""Checks copies of base weights in an adapter's file: equal copies are ignored, others would be lost.

It changes no weight.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.errors import BaseMismatchError

Parameter = Callable[[str], Tensor | None]  # a parameter's name → its values, or None where there is none
ROWS = 4096  # compared at a time


class ChangedWeightsWarning(UserWarning):
    """An adapter's file holds weights that differ from the base's, and they are not used."""


def check_copies(adapter: Adapter, parameter: Parameter, *, allow_different_base: bool = False) -> None:
    """Check that the copies equal the base's weights, up to the rounding to the dtype of each.

    Raises:
        BaseMismatchError: some differ (all are listed): they were also trained, or belong to another base.
    """
    problems = {name: _difference(copy, parameter(name)) for name, copy in adapter.copies.items()}
    listed = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    if not listed:
        return
    problem = f"this adapter's file contains weights that differ from the base's: {', '.join(listed)}"
    if allow_different_base:
        warnings.warn(f"{problem}; they are not used", ChangedWeightsWarning, stacklevel=2)
        return
    raise BaseMismatchError(
        f"{problem}; they were trained in addition to the factors, or belong to another base, and would be "
        "lost: load that base, or merge the adapter with the tool that trained it and use the merged model"
    )


def _difference(copy: Tensor, own: Tensor | None) -> str | None:
    if own is None:
        return "the base has no such weight"
    if not own.is_floating_point():
        return f"the base's is packed ({own.dtype}) and cannot be compared; load the base unquantised"
    if copy.shape != own.shape:
        return f"the file's has shape {tuple(copy.shape)}, the base's {tuple(own.shape)}"
    rows = 0
    for stored, base in zip(copy.split(ROWS), own.detach().split(ROWS), strict=True):
        equal = _equal(stored.cpu(), base.cpu())
        rows += 0 if bool(equal.all()) else int((~equal.reshape(len(stored), -1).all(1)).sum())
    return f"{rows:,} of {len(copy):,} rows differ" if rows else None


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Where both numbers can be roundings of the same number, each to its own dtype."""
    if {a.dtype, b.dtype} == {torch.float16, torch.bfloat16}:  # neither dtype contains the other's numbers
        a, b = a.double(), b.double()
        return (a - b).abs() <= 2.0**-8 * torch.maximum(a.abs(), b.abs()) + 2.0**-24
    coarse = max((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return a.to(coarse) == b.to(coarse)
