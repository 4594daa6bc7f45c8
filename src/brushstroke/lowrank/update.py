"""The interface of every type of update that an adapter can hold for one weight.

It does not implement an update: `LowRank` is one type, `DoRA` another. Other code uses only this interface
and does not assume that an update has factors.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Update(ABC):
    """A change ΔW of one base weight W (d×h), as an immutable value."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d, h): the input and the output width of the weight that this update changes; −1 if any fits."""

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this update can change a weight of this shape (d, h), where −1 fits any width too."""
        return all(own == width or -1 in (own, width) for own, width in zip(self.shape, shape, strict=True))

    @property
    @abstractmethod
    def parameters(self) -> int:
        """The number of values that the update holds."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the values that the update holds."""

    @abstractmethod
    def dense(self, W: Float[Tensor, "d h"] | None = None) -> Float[Tensor, "d h"]:
        """ΔW as a matrix; W is needed only by updates whose ΔW depends on it.

        Merging needs the same bits for any number of threads and from any `columns` of the update.
        """

    @abstractmethod
    def entries(
        self, i: Int[Tensor, " n"], j: Int[Tensor, " n"], W: Float[Tensor, "d h"] | None = None
    ) -> Float[Tensor, " n"]:
        """ΔW at the positions (i, j), in float64 on the CPU; does not form ΔW unless that is necessary."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> "Update":
        """The update of the columns start to stop of W (d×(stop − start)), of the same type."""

    @abstractmethod
    def delta_norm(self) -> float:
        """‖ΔW‖_F, in float64; raises ShapeError if ΔW depends on W."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """x·ΔW; does not form ΔW unless that is necessary."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the update holds, by name."""

    @abstractmethod
    def inner(self, other: "Update") -> float:
        """⟨ΔW₁, ΔW₂⟩, the sum of the products of all entries, in float64."""

    @abstractmethod
    def truncate(self, rank: int) -> "Update":
        """The best approximation of at most this rank."""

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        """The same update in another dtype or on another device.

        The type must be a dataclass whose fields have the names of its tensors, or replace this method.
        """
        moved = {name: tensor.to(device, dtype) for name, tensor in self.tensors().items()}
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    @abstractmethod
    def __add__(self, other: "Update") -> "Update": ...

    def __radd__(self, other: "Update") -> "Update":
        return self.__add__(other)

    @abstractmethod
    def __mul__(self, factor: float) -> "Update": ...

    def __rmul__(self, factor: float) -> "Update":
        return self * factor

    def __neg__(self) -> "Update":
        return self * -1.0

    def __sub__(self, other: "Update") -> "Update":
        return self + (-other)
