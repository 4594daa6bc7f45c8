"""The family of updates that an adapter can hold for one weight.

It holds no update of its own; `LowRank` is the first member, others (magnitudes, whole tensors) come later,
so code outside the family asks an update and never assumes that it has factors.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Update(ABC):
    """A change ΔW of one base weight W (d×h), as an immutable value."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d, h): the input and the output width of the weight that this update changes."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """How many numbers the update holds."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers that it holds."""

    @abstractmethod
    def dense(self, W: Float[Tensor, "d h"] | None = None) -> Float[Tensor, "d h"]:
        """ΔW itself; W is needed only by members of the family whose change depends on it."""

    @abstractmethod
    def entries(
        self, i: Int[Tensor, " n"], j: Int[Tensor, " n"], W: Float[Tensor, "d h"] | None = None
    ) -> Float[Tensor, " n"]:
        """ΔW at the positions (i, j), in float64 on the CPU, without forming ΔW where that can be avoided."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> "Update":
        """The update of the columns start to stop of W (d×(stop − start))."""

    @abstractmethod
    def delta_norm(self) -> float:
        """‖ΔW‖_F, in float64."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """x·ΔW, without forming ΔW where that can be avoided."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the update holds, by name."""

    @abstractmethod
    def inner(self, other: "Update") -> float:
        """⟨ΔW₁, ΔW₂⟩, the sum of the products of all entries, in float64."""

    @abstractmethod
    def truncate(self, rank: int) -> "Update":
        """The best approximation of at most this rank."""

    @abstractmethod
    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Update":
        """The same update in another dtype or on another device."""

    @abstractmethod
    def __add__(self, other: "Update") -> "Update": ...

    @abstractmethod
    def __mul__(self, factor: float) -> "Update": ...

    def __rmul__(self, factor: float) -> "Update":
        return self * factor

    def __neg__(self) -> "Update":
        return self * -1.0

    def __sub__(self, other: "Update") -> "Update":
        return self + (-other)
