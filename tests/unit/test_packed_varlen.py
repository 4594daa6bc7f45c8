"""A packed row as sequences: with a varlen kernel, attention equals that of the blocks.

The kernel itself needs a GPU (tests/gpu); here, a function with its documented behaviour replaces it.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from brushstroke.data import Example
from brushstroke.packed import sdpa as attend_module
from brushstroke.packed.attention import packed_attention
from brushstroke.packed.layout import Layout, build_layout
from brushstroke.packed.pack import Row, plan_passes
from brushstroke.packed.sdpa import attend_segments

HEADS, KV, WIDTH = 4, 2, 8


def by_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    **_: Any,
) -> Tensor:
    """Each sequence by itself; masks are aligned at the end, a window counts the keys to the left."""
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        own, seen = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        n, m = own.stop - own.start, seen.stop - seen.start
        assert n <= max_seqlen_q
        assert m <= max_seqlen_k
        left, right = window_size
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n + right)
        if left >= 0:
            mask = mask.triu(m - n - left)
        rows = (x.transpose(0, 1)[None] for x in (q[own], k[seen], v[seen]))
        out = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@st.composite
def batches(draw: st.DrawFn) -> list[Example]:
    rows = []
    stems = [[1] * 9, [2] * 14, [3]]
    for i in range(draw(st.integers(1, 9))):
        tokens = [*draw(st.sampled_from(stems)), 4 + i, *[5] * draw(st.integers(1, 12))]
        trained = draw(st.integers(1, len(tokens) - 1)) if tokens[0] == 3 else len(tokens) - 1
        weights = (0.0,) * trained + (1.0,) * (len(tokens) - trained)
        rows.append(Example(tuple(tokens), weights))
    return rows


def laid_out(rows: list[Example]) -> Layout:
    (whole,) = plan_passes([Row.of(row) for row in rows], 10_000, share=True)
    return build_layout(whole, torch.device("cpu"))


@settings(deadline=None)
@given(batches(), st.sampled_from([None, 1, 3, 12]), st.sampled_from([None, 0.3]))
def test_varlen_output_and_gradients_equal_those_of_the_blocks(
    rows: list[Example], window: int | None, scale: float | None
) -> None:
    layout = laid_out(rows)
    n = sum(layout.sizes)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(n, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV, KV, HEADS)
    )
    found = []
    for segmented in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        if segmented:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attend_module, "varlen_attn", by_bounds)
                out = attend_segments(*inputs, layout.segments, scale, window)
        else:
            heads_first = (x.transpose(0, 1)[None] for x in inputs)
            out, _ = packed_attention(
                nn.Identity(), *heads_first, None, scale, brushstroke_layout=layout, sliding_window=window
            )
            out = out[0]
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    for pieces, segments in zip(*found, strict=True):
        torch.testing.assert_close(segments, pieces, rtol=1e-10, atol=1e-12)


def test_a_row_without_shared_prefixes_repeats_no_key() -> None:
    rows = [Example(tuple(range(i + 2)), (0.0, *[1.0] * (i + 1))) for i in range(4)]
    segments = laid_out(rows).segments
    x = torch.randn(10, KV, WIDTH)
    assert segments.of_keys(x) is x
    assert segments.cu_seqlens_q.tolist() == segments.cu_seqlens_k.tolist() == [0, 1, 3, 6, 10]
