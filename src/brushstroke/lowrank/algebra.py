"""Sums, inner products and best approximations of low-rank products, in factor form.

Does not form a d×h matrix. A triple (U, V, scale) represents scale·U·V.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.lowrank.spectra import Svd


class Factors(NamedTuple):
    """scale·U·V as a triple."""

    U: Float[Tensor, "d r"]
    V: Float[Tensor, "r h"]
    scale: float


def add(terms: Sequence[Factors]) -> Factors:
    """Σ scaleₖ·Uₖ·Vₖ, exactly: concatenates the factors; the rank is the sum of the ranks.

    If the scales differ, they are multiplied into V; if all are equal, the factors keep their values.
    """
    scale = terms[0].scale
    U = torch.cat([term.U for term in terms], dim=1)
    if all(term.scale == scale for term in terms):
        return Factors(U, torch.cat([term.V for term in terms]), scale)
    return Factors(U, torch.cat([term.scale * term.V for term in terms]), 1.0)


def inner(a: Factors, b: Factors) -> float:
    """⟨a, b⟩ = s_a·s_b·Σ (U_aᵀ·U_b) ∘ (V_a·V_bᵀ), in float64."""
    left = a.U.double().mT @ b.U.double()
    right = a.V.double() @ b.V.double().mT
    return a.scale * b.scale * float((left * right).sum())


def norm(a: Factors) -> float:
    """‖scale·U·V‖_F from the r×r core of the two QR decompositions, in float64.

    The square root of `inner(a, a)` would lose half of the digits when the terms cancel.
    """
    r_u = torch.linalg.qr(a.U.double(), mode="r").R
    r_v = torch.linalg.qr(a.V.double().mT, mode="r").R
    return abs(a.scale) * float(torch.linalg.matrix_norm(r_u @ r_v.mT))


def from_svd(parts: Svd, rank: int, dtype: torch.dtype) -> Factors:
    """The leading `rank` triples of an SVD as factors: √sigma is multiplied into U and into V; scale 1."""
    root = parts.sigma[:rank].sqrt()
    U_rows = (root[:, None] * parts.left[:, :rank].mT).to(dtype).contiguous()
    V = (root[:, None] * parts.right[:rank]).to(dtype).contiguous()
    return Factors(U_rows.mT, V, 1.0)


def tail_norm(sigma: Float[Tensor, " k"], rank: int) -> float:
    """√Σ_{i>rank} sigma_i²: the error of the best approximation of that rank (Eckart-Young)."""
    return float(sigma[rank:].square().sum().sqrt())
