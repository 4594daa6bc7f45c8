"""DoRA, weight-decomposed low-rank adaptation (arXiv:2402.09353, equation 5): the update and its layer.

W' = m · (W + scale·U·V) / ‖W + scale·U·V‖, with the norm of each output column (rows in the paper, which uses
torch's layout). W' − W depends on W, so it does not support sums, products or norms without a base.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from brushstroke.errors import AttachError, ShapeError
from brushstroke.layers.adapted import Trial
from brushstroke.layers.fresh import Start, fresh_lora
from brushstroke.layers.linear import AttachedLinear, Factors
from brushstroke.lowrank import LowRank, Update
from brushstroke.lowrank.apply import LinearParts
from brushstroke.sites import weight_dxh


@dataclass(frozen=True, eq=False)
class DoRA(Update):
    """A low-rank direction scale·U·V, and the norm of each output column of the result.

    Args:
        U: input factor.
        V: output factor, same dtype and device as U.
        magnitude: m, the norms; same dtype and device as U.
        scale: multiplies U·V.

    Raises:
        ShapeError: the tensors do not fit one another.
    """

    U: Float[Tensor, "d r"]
    V: Float[Tensor, "r h"]
    magnitude: Float[Tensor, " h"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        h = self._direction.shape[1]
        if tuple(self.magnitude.shape) != (h,) or self.magnitude.dtype != self.U.dtype:
            raise ShapeError(
                f"the magnitude must hold {h} values of {self.U.dtype}, one for each output; got "
                f"{tuple(self.magnitude.shape)} of {self.magnitude.dtype}"
            )

    @property
    def _direction(self) -> LowRank:
        return LowRank(self.U, self.V, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, h)."""
        return self._direction.shape

    @property
    def rank(self) -> int:
        """r of U·V; the rank of the change W' − W is larger."""
        return self.U.shape[1]

    @property
    def parameters(self) -> int:
        """r·(d + h) + h."""
        return self._direction.parameters + self.magnitude.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors."""
        return self.U.dtype

    def tensors(self) -> dict[str, Tensor]:
        """{"U": U, "V": V, "magnitude": m}."""
        return {"U": self.U, "V": self.V, "magnitude": self.magnitude}

    def dense(self, W: Float[Tensor, "d h"] | None = None) -> Float[Tensor, "d h"]:
        """W' − W.

        Raises:
            ShapeError: W is not given.
        """
        if W is None:
            _refuse("its change")
        changed = W + self._direction.dense()
        return self.magnitude / changed.norm(dim=0) * changed - W

    def entries(
        self, i: Int[Tensor, " n"], j: Int[Tensor, " n"], W: Float[Tensor, "d h"] | None = None
    ) -> Float[Tensor, " n"]:
        """W' − W at the positions (i, j), in float64 on the CPU; reads only those columns of W."""
        if W is None:
            _refuse("its change")
        columns, at = j.unique(return_inverse=True)
        part = DoRA(self.U, self.V[:, columns], self.magnitude[columns], self.scale)
        return part.to(torch.float64, "cpu").dense(W[:, columns.to(W.device)].cpu().double())[i, at]

    def columns(self, start: int, stop: int) -> "DoRA":
        """The update of the columns start to stop of W."""
        return DoRA(self.U, self.V[:, start:stop], self.magnitude[start:stop], self.scale)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "DoRA":
        """The same update in another dtype or on another device."""
        U, V, magnitude = (tensor.to(device, dtype) for tensor in self.tensors().values())
        return DoRA(U, V, magnitude, self.scale)

    def delta_norm(self) -> float:
        """Raises ShapeError, because the norm depends on W."""
        _refuse("its norm")

    def apply(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b h"]:
        """Raises ShapeError, because x·(W' − W) depends on W."""
        _refuse("its product")

    def inner(self, other: Update) -> float:
        """Raises ShapeError, because the inner product depends on W."""
        _refuse("its inner product")

    def truncate(self, rank: int) -> "DoRA":
        """Raises ShapeError, because the best approximation depends on W."""
        _refuse("its truncation")

    def __add__(self, other: Update) -> "DoRA":
        _refuse("a sum with it")

    def __radd__(self, other: Update) -> "DoRA":
        _refuse("a sum with it")

    def __mul__(self, factor: float) -> "DoRA":
        _refuse("a multiple of it")


def _refuse(what: str) -> NoReturn:
    raise ShapeError(
        f"a DoRA update changes W by an amount that depends on W, so {what} is not known without the base; "
        "merge the adapter into its base and work with the merged weights, or use dense(W)"
    )


def fresh_dora(start: Start) -> DoRA:
    """V = 0 and the norms of W as magnitude, so that the model first computes what its base computes."""
    zero = fresh_lora(start)
    return DoRA(zero.U, zero.V, _plain_weight(start.module, start.site.path).norm(dim=0).cpu(), zero.scale)


class AttachedDoRA(AttachedLinear):
    """y = x·W' + bias for linear layers with one adapter.

    Parameters `lora_U_rows` (r×d), `lora_V` (r×h) and `lora_magnitude` (h). The norms have no gradient
    (arXiv:2402.09353, section 4.3).
    """

    lora_magnitude: nn.Parameter
    lora_squares: Tensor  # ‖W‖² of each output column
    _added = (*AttachedLinear._added, "lora_magnitude", "lora_squares")

    def install(self, update: DoRA, *, trainable: bool, dropout: float) -> None:  # type: ignore[override]
        """Store U, V and the magnitude."""
        super().install(update._direction, trainable=trainable, dropout=dropout)
        value = update.magnitude.detach().to(self.lora_V.device, self.lora_V.dtype).clone()
        self.register_parameter("lora_magnitude", nn.Parameter(value, requires_grad=trainable))
        W = _plain_weight(self, type(self).__name__)
        self.register_buffer("lora_squares", W.square().sum(0).to(value.device), persistent=False)

    def factors(self) -> Mapping[str, nn.Parameter]:
        """Uᵀ (r×d), V (r×h), the magnitude (h)."""
        return {**super().factors(), "lora_magnitude": self.lora_magnitude}

    def update(self) -> DoRA:  # type: ignore[override]
        """Copies of the current tensors."""
        low = super().update()
        return DoRA(low.U, low.V, self.lora_magnitude.detach().clone(), low.scale)

    def parts(self, x: Tensor) -> LinearParts | None:
        """None: the fused functions do not support norms."""
        self._route.record(self)
        return None

    def add_update(self, y: Tensor, x: Tensor, factors: Factors, dropout: float) -> Tensor:
        """y + (m/n − 1)·x·W + m/n·scale·(x·U)·V, where n are the norms of W + scale·U·V."""
        gain = self.lora_magnitude / self._norms(factors)
        if dropout:
            x = nn.functional.dropout(x, dropout)
            base = self._kind.product(self, x, self._kind.to_dxh(self.weight))
        else:
            base = y if self.bias is None else y - self.bias
        return y + ((gain - 1) * base + gain * self.term(x, factors)).to(y.dtype)

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        """A random U·V, and magnitudes of twice the norms of W."""
        tensors, settings, expected = super().trial(x, base, generator)
        magnitude = 2 * self.lora_squares.sqrt()
        factors = tensors["lora_U_rows"], tensors["lora_V"], 1.0
        gain = (magnitude / self._norms(factors)).double()
        plain = base.double() - (0.0 if self.bias is None else self.bias.double())
        return Trial(
            {**tensors, "lora_magnitude": magnitude},
            settings,
            base.double() + (gain - 1) * plain + gain * (expected - base.double()),
        )

    @torch.no_grad()
    def _norms(self, factors: Factors) -> Float[Tensor, " h"]:
        """‖W + scale·U·V‖ of each output column, without forming U·V."""
        U_rows, V, scale = factors
        wide = torch.promote_types(V.dtype, torch.float32)
        UW = (U_rows.to(self.weight.dtype) @ self._kind.to_dxh(self.weight)).to(wide)
        U_rows, V = U_rows.to(wide), V.to(wide)
        squares = (
            self.lora_squares + 2 * scale * (UW * V).sum(0) + scale**2 * ((U_rows @ U_rows.mT @ V) * V).sum(0)
        )
        return squares.clamp_min(0).sqrt()


def _plain_weight(module: nn.Module, where: str) -> Float[Tensor, "d h"]:
    W = weight_dxh(module)
    if W is None:
        raise AttachError(
            f"{where}: its weight is packed (quantised), and DoRA needs its norms; use a LowRank update"
        )
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))
