"""Low-rank updates of embeddings: the output of token t is W[t] + scale·U[t]·V, for one adapter or a bank.

U (d×r) has one row per token. It does not change a tied output layer, which keeps W; merging unties the two.
"""

import torch
from jaxtyping import Float, Int
from torch import Size, Tensor

from brushstroke.layers.fresh import Start
from brushstroke.layers.linear import AttachedLinear, BankedLinear, Factors, _LowRankLayer
from brushstroke.lowrank import LowRank


class EmbeddingLowRank(LowRank):
    """scale·U·V for an embedding of d tokens and width h; in files its factors have other names."""


def fresh_embedding(start: Start) -> EmbeddingLowRank:
    """U = 0 and V from the standard normal distribution, so that all rows of U train at the same rate."""
    V = torch.randn(start.rank, start.site.h, generator=start.generator)
    return EmbeddingLowRank(torch.zeros(start.site.d, start.rank), V, start.scale)


class _Lookup(_LowRankLayer):
    """The low-rank term of token t: scale·U[t]·V, times the factor by which some models multiply W[t]."""

    def leading(self, x: Int[Tensor, "*b"]) -> Size:
        """The whole shape: every number of the input is a token."""
        return x.shape

    def is_plain(self, x: Tensor) -> bool:
        """False: the output is a sum of rows of W, not a product."""
        return False

    def term(self, x: Int[Tensor, "*b"], factors: Factors, dropout: float = 0.0) -> Float[Tensor, "*b h"]:
        """The low-rank term; dropout does not apply, because there is no input vector to drop."""
        U_rows, V, scale = factors
        return self.plain_term(x, U_rows.mT, scale * V)


class AttachedEmbedding(_Lookup, AttachedLinear):
    """The base's row of each token, plus scale·U[t]·V; parameters as in `AttachedLinear`."""

    def update(self) -> EmbeddingLowRank:
        """Copies of the current U and V."""
        return EmbeddingLowRank(*super().update().factors)


class BankedEmbedding(_Lookup, BankedLinear):
    """The base's row of each token, plus the term of its batch row's slot; buffers as in `BankedLinear`."""

    def may_stack(self, x: Tensor) -> bool:
        """False: a lookup for all slots costs more than one for each row's slot."""
        return False

    def gathered(self, x: Tensor, slots: Tensor) -> Tensor:
        """The term of rows with these slots; one index selects slot and token in U."""
        index = slots.view(-1, *[1] * (x.ndim - 1))
        xu = self.bank_U_rows.mT[index, x]
        return torch.einsum("b...r,brh->b...h", xu, self.bank_V[slots])
