"""Low-rank updates of embeddings: the output of token t is W[t] + scale·U[t]·V, for one adapter or a bank.

U (d×r) has a row for each token. A tied output layer keeps the base's weight; merging unties the two.
"""

import torch
from jaxtyping import Float, Int
from torch import Size, Tensor

from brushstroke.layers.fresh import Start
from brushstroke.layers.linear import AttachedLinear, BankedLinear, Factors, _LowRankLayer
from brushstroke.lowrank import LowRank
from brushstroke.lowrank.apply import LinearParts


class EmbeddingLowRank(LowRank):
    """scale·U·V for an embedding of d tokens and width h; files have other names for its factors."""


def zero_U(start: Start) -> EmbeddingLowRank:
    """U = 0 and V from the standard normal distribution: every token's row of U moves at the same rate."""
    V = torch.randn(start.rank, start.site.h, generator=start.generator)
    return EmbeddingLowRank(torch.zeros(start.site.d, start.rank), V, start.scale)


class _Lookup(_LowRankLayer):
    """The low-rank term of token t: scale·U[t]·V, times the factor that some models multiply W[t] by."""

    def leading(self, x: Int[Tensor, "*b"]) -> Size:
        """Every number of the input is a token."""
        return x.shape

    def term(self, x: Int[Tensor, "*b"], factors: Factors, dropout: float = 0.0) -> Float[Tensor, "*b h"]:
        """Dropout does not apply: there is no input to drop."""
        U_rows, V, scale = factors
        return self._kind.product(self, x, U_rows.mT) @ (scale * V)


class AttachedEmbedding(_Lookup, AttachedLinear):
    """The base's row of each token, plus scale·U[t]·V; parameters as in `AttachedLinear`."""

    def parts(self, x: Tensor) -> LinearParts | None:
        """None: the fused functions are for linear layers."""
        self._route.record(self)
        return None

    def update(self) -> EmbeddingLowRank:
        """U and V as they are now, copied."""
        return EmbeddingLowRank(*super().update().factors)


class BankedEmbedding(_Lookup, BankedLinear):
    """The base's row of each token, plus the term of the slot of its row; buffers as in `BankedLinear`."""

    def parts(self, x: Tensor) -> LinearParts | None:
        """None: the fused functions are for linear layers."""
        return None

    def may_stack(self, x: Tensor) -> bool:
        """Never: a lookup of all slots costs more than those of the rows."""
        return False

    def gathered(self, x: Tensor, slots: Tensor) -> Tensor:
        """The term of rows with these slots: U is indexed by slot and token at once."""
        index = slots.view(-1, *[1] * (x.ndim - 1))
        xu = self.bank_U_rows.mT[index, x]
        return torch.einsum("b...r,brh->b...h", xu, self.bank_V[slots])
