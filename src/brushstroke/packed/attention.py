"""Exact attention for a packed row, as a function in transformers' AttentionInterface.

It reads the layout of the packed pass, which the model receives as an extra keyword argument and passes on.
A token attends only to its own example: the shared prefix and the earlier tokens. It does not pad the row;
padding exists only inside one attention call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from brushstroke.packed.layout import Layout, Piece
from brushstroke.packed.sdpa import (
    attend,
    attend_matmul,
    attend_segments,
    by_segments,
    prefers_matmul,
)

NAME = "brushstroke_packed"


class UnsupportedAttention(RuntimeError):
    """The model's attention has a feature that packed attention lacks; padded batches are used instead."""


class _Gather(torch.autograd.Function):
    """Select along one axis; each position is selected exactly once, apart from copies without a gradient.

    The backward pass is also a selection, by the inverse index: it needs no scatter and no sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: int, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.axis, ctx.inverse = axis, inverse
        return x.index_select(axis, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        return grad.index_select(ctx.axis, ctx.inverse), None, None, None


class _Scatter(torch.autograd.Function):
    """Drop the padded positions; their gradient is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.length = x.shape[0]
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.length, *grad.shape[1:]).index_copy_(0, index, grad), None


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads n w"],
    key: Float[Tensor, "1 kv n w"],
    value: Float[Tensor, "1 kv n w"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    brushstroke_layout: Layout | None = None,
    sliding_window: int | None = None,
    brushstroke_record: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 n heads w"], None]:
    """Attention for each piece of a packed row.

    The settings that the module passes are written to `brushstroke_record`.

    Raises:
        UnsupportedAttention: there is no layout, or the model needs a feature that is not exact here.
    """
    if brushstroke_layout is None:
        raise UnsupportedAttention("the model does not pass extra keywords on to its attention")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedAttention(f"its attention uses {', '.join(unknown) or 'a mask of its own'}")
    if brushstroke_record is not None:
        brushstroke_record.update(scaling=scaling, dropout=dropout, sliding_window=sliding_window)
    layout = brushstroke_layout
    layout.windows.add(sliding_window)
    if layout.begins is not None:
        layout.begins.record(module, key, value)
    windowed = sliding_window is not None
    if layout.several and layout.continues is None and by_segments(query, value, dropout, windowed):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attend_segments(q, k, v, layout.segments, scaling, sliding_window)[None], None
    queries, keys, values = (x.split(layout.sizes, dim=2) for x in (query, key, value))
    outputs = []
    for i, piece in enumerate(layout.pieces):
        q, k, v = (_to_rows(x[i], piece) for x in (queries, keys, values))
        prefix, before = 0, None
        if piece.prefix is not None:
            before = keys[piece.prefix], values[piece.prefix]
        elif layout.continues is not None:
            before = layout.continues.of(module)
        if before is not None:
            prefix = before[0].shape[2]
            k, v = (
                torch.cat([x.expand(piece.rows, -1, -1, -1), own], dim=2)
                for x, own in zip(before, (k, v), strict=True)
            )
        windowed = sliding_window is not None and sliding_window < prefix + piece.width
        window = sliding_window if windowed else None
        if prefers_matmul(q, k, dropout):
            out = attend_matmul(q, k, v, layout.mask(piece.width, prefix, window), scaling)
        else:
            mask = layout.mask(piece.width, prefix, window) if prefix or windowed else None
            out = attend(q, k, v, mask, scaling, dropout)
        outputs.append(_from_rows(out, piece))
    return torch.cat(outputs)[None], None


def _to_rows(x: Float[Tensor, "1 heads t w"], piece: Piece) -> Float[Tensor, "rows heads width w"]:
    if piece.rows == 1:
        return x
    if piece.pad is not None:
        x = _Gather.apply(x, 2, piece.pad, piece.unpad)
    return x.view(x.shape[1], piece.rows, piece.width, x.shape[3]).transpose(0, 1)


def _from_rows(out: Float[Tensor, "rows heads width w"], piece: Piece) -> Float[Tensor, "t heads w"]:
    flat = out.transpose(1, 2).reshape(piece.rows * piece.width, out.shape[1], out.shape[3])
    return flat if piece.unpad is None else _Scatter.apply(flat, piece.unpad)


class AttentionName:
    """Sets the name of the attention function in a model's configs during a packed pass, then restores it.

    transformers builds no masks for a name that its mask registry does not contain. The name must therefore
    always be restored: otherwise a padded `generate` would silently attend to the padding.
    """

    def __init__(self, model: nn.Module) -> None:
        configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self._configs = [c for c in configs.values() if hasattr(c, "_attn_implementation")]

    @property
    def chunked(self) -> int | None:
        """The chunk length of chunked attention, which the attention function does not receive."""
        lengths = [getattr(config, "attention_chunk_size", None) for config in self._configs]
        return next((length for length in lengths if length), None)

    @property
    def window(self) -> int | None:
        """The sliding window that a config declares, even if the attention function does not receive it."""
        declared = [getattr(config, "sliding_window", None) for config in self._configs if _may_slide(config)]
        return next((window for window in declared if window), None)

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Context manager: run packed attention."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = NAME
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name


def _may_slide(config: Any) -> bool:
    """False if a config lists the kinds of its layers and all of them use full attention."""
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or (None,))


AttentionInterface.register(NAME, packed_attention)
