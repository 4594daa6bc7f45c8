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
from brushstroke.layers.linear import AttachedLinear, BankedLinear, Factors
from brushstroke.lowrank import LowRank, Update
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
        return type(self)(self.U, self.V[:, start:stop], self.magnitude[start:stop], self.scale)

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
        """Store U, V and the magnitude.

        Raises:
            AttachError: W is packed, or a column of W + scale·U·V has the norm 0.
        """
        super().install(update._direction, trainable=trainable, dropout=dropout)
        value = update.magnitude.detach().to(self.lora_V.device, self.lora_V.dtype).clone()
        self.register_parameter("lora_magnitude", nn.Parameter(value, requires_grad=trainable))
        W = _plain_weight(self, self._site)
        self.register_buffer("lora_squares", W.square().sum(0).to(value.device), persistent=False)
        norms = self._norms((self.lora_U_rows, self.lora_V, self.lora_scale))
        if zero := int((norms == 0).sum()):
            raise AttachError(
                f"{self._site}: {zero} of {len(norms)} output columns of W + U·V are zero, and DoRA divides "
                "by their norms; leave the site out, or use the variant lora"
            )

    def factors(self) -> Mapping[str, nn.Parameter]:
        """Uᵀ (r×d), V (r×h), the magnitude (h)."""
        return {**super().factors(), "lora_magnitude": self.lora_magnitude}

    def update(self) -> DoRA:  # type: ignore[override]
        """Copies of the current tensors."""
        low = super().update()
        return DoRA(low.U, low.V, self.lora_magnitude.detach().clone(), low.scale)

    def is_plain(self, x: Tensor) -> bool:
        """False: the output is not a sum with x·W, because the update scales W."""
        return False

    def add_update(self, y: Tensor, x: Tensor, factors: Factors, dropout: float) -> Tensor:
        """y + (m/n − 1)·x·W + m/n·scale·(x·U)·V, where n are the norms of W + scale·U·V."""
        gain = self.lora_magnitude / self._norms(factors)
        if dropout:
            x = nn.functional.dropout(x, dropout)
            base = self._kind.product(self, x, self._kind.to_dxh(self.weight))
        else:
            base = _without_bias(self, y)
        return y + ((gain - 1) * base + gain * self.term(x, factors)).to(y.dtype)

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        """A random U·V, and magnitudes of twice the norms of W."""
        tensors, settings, expected = super().trial(x, base, generator)
        magnitude = 2 * self.lora_squares.sqrt()
        factors = tensors["lora_U_rows"], tensors["lora_V"], 1.0
        gain = (magnitude / self._norms(factors)).double()
        plain = _without_bias(self, base.double())
        return Trial(
            {**tensors, "lora_magnitude": magnitude},
            settings,
            base.double() + (gain - 1) * plain + gain * (expected - base.double()),
        )

    @torch.no_grad()
    def _norms(self, factors: Factors) -> Float[Tensor, " h"]:
        """‖W + scale·U·V‖ of each output column, without forming U·V."""
        U_rows, V, scale = factors
        wide = _wide(V)
        UW = (U_rows.to(self.weight.dtype) @ self._kind.to_dxh(self.weight)).to(wide)
        U_rows, V = U_rows.to(wide), V.to(wide)
        squares = (
            self.lora_squares + 2 * scale * (UW * V).sum(0) + scale**2 * ((U_rows @ U_rows.mT @ V) * V).sum(0)
        )
        return squares.clamp_min(0).sqrt()


class BankedDoRA(BankedLinear):
    """y = g_s·x·W + (x·U_s)·V_s + bias with g_s = m_s / ‖W + ΔW_s‖; V includes the scale and g_s.

    Buffer `bank_gain` (s×h, at least fp32) holds g_s: 1 in empty slots, and for a `LowRank` in a slot.
    """

    bank_gain: Tensor
    _added = (*BankedLinear._added, "bank_gain")

    @classmethod
    def fits(cls, update: DoRA | LowRank, module: nn.Module) -> bool:
        """Whether g_s, U and V are finite."""
        return super().fits(_banked(module, update)[0], module)

    def prepare(self) -> None:
        """One slot, without an update."""
        super().prepare()
        self._set_gain(self.bank_V.new_ones(1, self.widths[1], dtype=_wide(self.bank_V)))

    def write(self, slot: int, update: DoRA | LowRank | None) -> None:
        """Write a slot."""
        low, gain = (None, torch.ones(1)) if update is None else _banked(self, update)
        self.store(slot, low)
        gains, slots = self.bank_gain, self.bank_V.shape[0]
        if len(gains) < slots:
            self._set_gain(torch.cat([gains, gains.new_ones(slots - len(gains), gains.shape[1])]))
        self.bank_gain[slot] = gain

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        """A random U·V in slot 1, and a gain of 2."""
        tensors, settings, expected = super().trial(x, base, generator)
        gain = torch.ones_like(tensors["bank_V"][:, 0], dtype=_wide(self.bank_V))
        gain[1] = 2
        return Trial({**tensors, "bank_gain": gain}, settings, expected + _without_bias(self, base).double())

    def is_plain(self, x: Tensor) -> bool:
        """False: the output is not a sum with x·W, because the update scales W."""
        return False

    def may_stack(self, x: Tensor) -> bool:
        """False: each row scales the base's output too."""
        return False

    def add_update(self, y: Tensor, x: Tensor, factors: Factors, dropout: float) -> Tensor:
        """y + (g − 1)·x·W + (x·U)·V."""
        U_rows, V, gain = factors
        return y + ((gain - 1) * _without_bias(self, y) + self.term(x, (U_rows, V, 1.0))).to(y.dtype)

    def add_gathered(self, y: Tensor, x: Tensor, slots: Tensor) -> Tensor:
        """The same for rows with these slots."""
        gain = self.bank_gain[slots].view(-1, *[1] * (y.ndim - 2), y.shape[-1])
        return y + ((gain - 1) * _without_bias(self, y) + self.gathered(x, slots)).to(y.dtype)

    def _factors(self, slot: int) -> Factors:
        U_rows, V, _ = super()._factors(slot)
        return U_rows, V, self.bank_gain[slot]

    def _set_gain(self, gain: Tensor) -> None:
        self.register_buffer("bank_gain", gain, persistent=False)


def _without_bias(layer: AttachedLinear | BankedLinear, y: Tensor) -> Tensor:
    """x·W, from the output x·W + bias."""
    return y if layer.bias is None else y - layer.bias


def _wide(tensor: Tensor) -> torch.dtype:
    """The tensor's dtype, but at least fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _banked(module: nn.Module, update: DoRA | LowRank) -> tuple[LowRank, Float[Tensor, "..."]]:
    """What a slot holds: U and g·scale·V, and g for each output column."""
    if isinstance(update, LowRank):
        return update, torch.ones(1)
    W = _plain_weight(module, type(module).__name__)
    U, V, magnitude = (t.to(W.device, W.dtype) for t in update.tensors().values())
    gain = magnitude / (W + update.scale * (U @ V)).norm(dim=0)
    return LowRank(U, gain * update.scale * V), gain


def _plain_weight(module: nn.Module, where: str) -> Float[Tensor, "d h"]:
    W = weight_dxh(module)
    if W is None:
        raise AttachError(
            f"{where}: its weight is packed (quantised), and DoRA needs its norms; use a LowRank update"
        )
    return W.detach().to(_wide(W))
