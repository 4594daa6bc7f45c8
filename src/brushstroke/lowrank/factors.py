"""Defines `LowRank`, one low-rank update as an immutable value.

Does not record which weight it belongs to, and does not use modules or files.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from brushstroke.errors import ConfigError, ShapeError
from brushstroke.lowrank import algebra
from brushstroke.lowrank.algebra import Factors
from brushstroke.lowrank.product import reproducible_product
from brushstroke.lowrank.spectra import Svd, above_rounding, product_rounding, singular_values, svd
from brushstroke.lowrank.update import Update


@dataclass(frozen=True, eq=False)
class LowRank(Update):
    """ΔW = scale·U·V (arXiv:2106.09685, section 4.1, with U = Aᵀ, V = Bᵀ).

    Operators return new values. Sums are exact in factor form (if the scales differ, up to rounding of the
    factors' dtype), and the rank of a sum is the sum of the ranks.

    Args:
        U: input factor, any float dtype.
        V: output factor, same dtype and device as U.
        scale: multiplies the product; alpha/rank, alpha/√rank or a literal.

    Raises:
        ShapeError: the factors are not two matrices that can be multiplied, or differ in dtype or device.

    >>> a = LowRank(torch.ones(3, 1), torch.ones(1, 2), scale=0.5)
    >>> (2.0 * a + a).dense()[0]
    tensor([1.5000, 1.5000])
    """

    U: Float[Tensor, "d r"]
    V: Float[Tensor, "r h"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        U, V = self.U, self.V
        if U.ndim != 2 or V.ndim != 2 or U.shape[1] != V.shape[0]:
            raise ShapeError(
                f"U must be (d, r) and V (r, h) with the same rank r; got U {tuple(U.shape)} and V "
                f"{tuple(V.shape)}"
            )
        if U.dtype != V.dtype or not U.is_floating_point():
            raise ShapeError(f"U and V must share one float dtype; got {U.dtype} and {V.dtype}")
        if U.device != V.device:
            raise ShapeError(f"U and V must be on one device; got {U.device} and {V.device}")
        object.__setattr__(self, "scale", float(self.scale))

    @property
    def shape(self) -> tuple[int, int]:
        """(d, h)."""
        return self.U.shape[0], self.V.shape[1]

    @property
    def d(self) -> int:
        """Input width."""
        return self.U.shape[0]

    @property
    def h(self) -> int:
        """Output width."""
        return self.V.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of U."""
        return self.U.shape[1]

    @property
    def parameters(self) -> int:
        """r·(d + h)."""
        return self.U.numel() + self.V.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.U.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.U.device

    @property
    def factors(self) -> Factors:
        """The triple (U, V, scale)."""
        return Factors(self.U, self.V, self.scale)

    @property
    def sigma(self) -> Float[Tensor, " k"]:
        """The singular values of ΔW, descending, float64, k = min(r, d, h)."""
        return singular_values(*self.factors)

    def svd(self) -> Svd:
        """The thin SVD of ΔW from the factors, float64."""
        return svd(*self.factors)

    def directions(self) -> Svd:
        """The thin SVD of ΔW, float64, without triples that rounding of the factors could explain."""
        parts = self.svd()
        kept = above_rounding(parts.sigma, max(self.shape), product_rounding(*self.factors, parts))
        return Svd(parts.left[:, kept], parts.sigma[kept], parts.right[kept])

    def tensors(self) -> dict[str, Tensor]:
        """{"U": U, "V": V}."""
        return {"U": self.U, "V": self.V}

    def dense(self, W: Float[Tensor, "d h"] | None = None) -> Float[Tensor, "d h"]:
        """scale·U·V; W is not needed. The bits do not depend on threads or on blocks of columns."""
        return self.scale * reproducible_product(self.U, self.V)

    def entries(
        self, i: Int[Tensor, " n"], j: Int[Tensor, " n"], W: Float[Tensor, "d h"] | None = None
    ) -> Float[Tensor, " n"]:
        """scale·(U·V)[i, j], in float64 on the CPU; W is not needed."""
        U, V = self.U.to("cpu", torch.float64), self.V.to("cpu", torch.float64)
        return self.scale * (U[i] * V[:, j].mT).sum(-1)

    def apply(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """scale·(x·U)·V."""
        return self.scale * ((x @ self.U) @ self.V)

    def columns(self, start: int, stop: int) -> "LowRank":
        """The update of the columns start to stop of W (d×(stop − start))."""
        return type(self)(self.U, self.V[:, start:stop], self.scale)

    def delta_norm(self) -> float:
        """‖ΔW‖_F in float64, from the factors."""
        return algebra.norm(self.factors)

    def inner(self, other: Update) -> float:
        """⟨ΔW₁, ΔW₂⟩ in float64, from the factors."""
        if not isinstance(other, LowRank):
            raise ShapeError(f"expected the factors of a second low-rank update; got {type(other).__name__}")
        self._check(other)
        return algebra.inner(self.factors, other.factors)

    def truncate(self, rank: int) -> "LowRank":
        """The nearest update (in Frobenius norm) of at most this rank; `self` if its rank is not larger.

        Raises:
            ConfigError: rank is below 1.
        """
        if rank < 1:
            raise ConfigError(f"the rank of a truncation must be at least 1; got {rank}")
        if rank >= self.rank:
            return self
        return type(self)(*algebra.from_svd(self.svd(), rank, self.dtype))

    def truncation_loss(self, rank: int) -> float:
        """‖ΔW − truncate(rank)‖_F, computed without truncating (Eckart-Young)."""
        return algebra.tail_norm(self.sigma, rank)

    def __add__(self, other: Update) -> "LowRank":
        if not isinstance(other, LowRank):
            return NotImplemented
        self._check(other)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return type(self)(*algebra.add([self.to(dtype).factors, other.to(dtype, self.device).factors]))

    def __mul__(self, factor: float) -> "LowRank":
        return type(self)(self.U, self.V, float(factor) * self.scale)

    def _check(self, other: "LowRank") -> None:
        if self.shape != other.shape:
            raise ShapeError(
                f"two updates of one weight must have the same shape; got {self.shape} and {other.shape}"
            )
