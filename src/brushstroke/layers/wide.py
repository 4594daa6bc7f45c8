"""Half precision: a frozen weight and its update in one matrix, so that one product rounds their sum once.

y = [x ‖ x·U]·[W ; scale·V]. With two products, x·W is rounded to half precision before the low-rank term is
added, and a term that is smaller than the rounding error is lost. This module computes no products.
"""

from typing import Any

import torch
from torch import Tensor, nn

from brushstroke.sites import Kind

HALF = (torch.bfloat16, torch.float16)
MULTIPLE = 32  # elements: the rows of the matrix start at multiples of 64 bytes
MOST_RANKS = 256  # for more ranks, two products are used


class WideWeight:
    """[W ; scale·V] as one (d+p)×h matrix; a layer's weight becomes a view of its first d rows.

    The weight stays the same Parameter. p is the sum of ranks, rounded up; unused rows are zero.

    Args:
        module: a layer for which `fits` is true.
        kind: its kind.
        ranks: the rank of an update, or the sum of those of all slots.
    """

    def __init__(self, module: nn.Module, kind: Kind, ranks: int) -> None:
        weight: Any = module.weight
        W = kind.to_dxh(weight.data)
        d, h = W.shape
        width = -(-(d + ranks) // MULTIPLE) * MULTIPLE
        self.matrix = W.new_empty(width, h) if W.is_contiguous() else W.new_empty(h, width).mT
        self.matrix[:d] = W
        self.matrix[d:] = 0
        self._d, self._ranks = d, ranks
        self._written: tuple[Any, ...] | None = None
        weight.data = kind.from_dxh(self.matrix[:d], weight.shape)

    @staticmethod
    def fits(module: nn.Module, ranks: int) -> bool:
        """Whether a layer's weight can become a view: plain, in half precision, in its own storage."""
        weight: Any = module.weight
        plain = (
            type(weight) is nn.Parameter and type(weight.data) is Tensor and weight.layout == torch.strided
        )
        if not (plain and weight.dtype in HALF and 0 < ranks <= MOST_RANKS and weight.is_contiguous()):
            return False
        return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()

    def holds(self, weight: Tensor, ranks: int) -> bool:
        """Whether a weight is still the view, with room for these ranks; `module.to(...)` replaces it."""
        return self._ranks == ranks and weight.data_ptr() == self.matrix.data_ptr()

    def with_update(self, V: Tensor, scale: float, constant: bool) -> Tensor:
        """The matrix, with scale·V (r×h) copied into it; for `constant` see the layer's `with_update`."""
        key = (V.data_ptr(), V._version, scale) if constant and not V.is_inference() else None
        if key is None or key != self._written:
            torch.mul(V.detach(), scale, out=self.matrix[self._d : self._d + len(V)])
            self._written = key
        return self.matrix

    def release(self, module: nn.Module) -> None:
        """Give the layer's weight its own storage again."""
        weight: Any = module.weight
        if self.holds(weight, self._ranks):
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
