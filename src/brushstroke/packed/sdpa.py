"""Attention kernels: torch's kernel, batched matrix products where they are faster, varlen kernels on a GPU.

It does not plan packing: `attention` splits a packed row into batches, or passes the whole row to a varlen
kernel with the bounds of its sequences.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from brushstroke.lowrank.autograd import first_order
from brushstroke.lowrank.matmul import HALF, lacks_products
from brushstroke.packed.varlen import Segments

MOST_SCORES = 16 * 1024 * 1024  # of one `attend_matmul` call, which stores all scores
WIDEST_HEAD = 256  # for which the flash kernel has a backward pass
ALIGNED_AT_THE_END = (
    2  # the memory-efficient kernel's number for a causal mask with the last key on the diagonal
)
# For fewer key heads than query heads, torch 2.12 requires enable_gqa; torch 2.11 has no such parameter.
_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def prefers_matmul(q: Float[Tensor, "b heads n w"], k: Float[Tensor, "b kv m w"], dropout: float) -> bool:
    """Whether to use `attend_matmul`: for bf16 on a CPU with products in it, where torch's kernel is slow.

    Measured at 1.5 to 4 times the kernel's speed for 90 to 900 keys; in fp32 the kernel wins.
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or lacks_products(q):
        return False
    return not dropout and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= MOST_SCORES


def attend(
    q: Float[Tensor, "b heads n w"],
    k: Float[Tensor, "b kv m w"],
    v: Float[Tensor, "b kv m u"],
    mask: Bool[Tensor, "n m"] | None,
    scale: float | None,
    dropout: float = 0.0,
) -> Float[Tensor, "b heads n u"]:
    """softmax(scale·q·kᵀ)·v over the keys where the mask is true, by torch's kernel; causal without a mask.

    With fewer key heads than query heads, several query heads share one. The scale is 1/√w by default.
    Half precision on a processor without products in it runs in fp32.
    """
    if lacks_products(q):
        return attend(q.float(), k.float(), v.float(), mask, scale, dropout).to(q.dtype)
    shared = q.shape[1] // k.shape[1]
    fast = mask is None and q.dtype in HALF
    if (
        q.device.type == "cuda" and shared > 1 and not fast
    ):  # else torch falls back to a kernel that stores all scores
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
    )


class _Products(torch.autograd.Function):
    """Heads that share keys form one product. Saves q, k and v; the probabilities are recomputed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        ctx.shapes, ctx.scale = (q.shape, k.shape, v.shape), scale
        q, k, v = (x.reshape(k.shape[0] * k.shape[1], -1, x.shape[-1]) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, hidden)
        return torch.bmm(_probabilities(q, k, hidden, scale), v).view(*ctx.shapes[0][:-1], v.shape[-1])

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, hidden = ctx.saved_tensors
        grad = grad_outputs[0].reshape(*q.shape[:-1], v.shape[-1])
        probabilities = _probabilities(q, k, hidden, ctx.scale)
        dv = torch.bmm(probabilities.mT, grad)
        dp = torch.bmm(grad, v.mT)
        ds = torch.ops.aten._softmax_backward_data(dp, probabilities, -1, probabilities.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.mT, q)
        return *(x.view(shape) for x, shape in zip((dq, dk, dv), ctx.shapes, strict=True)), None, None


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return torch.softmax(torch.baddbmm(hidden.expand(q.shape[0], -1, -1), q, k.mT, alpha=scale), dim=-1)


def attend_matmul(
    q: Float[Tensor, "b heads n w"],
    k: Float[Tensor, "b kv m w"],
    v: Float[Tensor, "b kv m u"],
    mask: Bool[Tensor, "n m"],
    scale: float | None,
) -> Float[Tensor, "b heads n u"]:
    """Equals `attend`, by batched products. The scores are rounded to the dtype of q."""
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    hidden = hidden.repeat(q.shape[1] // k.shape[1], 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Products.apply(q, k, v, hidden, scale)  # type: ignore[return-value]


def by_segments(
    q: Float[Tensor, "1 heads n w"], v: Float[Tensor, "1 kv n u"], dropout: float, windowed: bool
) -> bool:
    """Whether to use `attend_segments`: on a GPU, without dropout, for widths that its kernels support.

    Not for fp32 with a window: the kernel's gradients (torch 2.11) are wrong if keys precede the queries.
    """
    width = q.shape[-1]
    return (
        q.device.type == "cuda"
        and (q.dtype in HALF or (q.dtype == torch.float32 and not windowed))
        and not dropout
        and width == v.shape[-1]
        and width % 8 == 0
        and width <= WIDEST_HEAD
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attend_segments(
    q: Float[Tensor, "n heads w"],
    k: Float[Tensor, "n kv w"],
    v: Float[Tensor, "n kv w"],
    segments: Segments,
    scale: float | None,
    window: int | None,
) -> Float[Tensor, "n heads w"]:
    """Causal attention within each sequence of a packed row, by torch's varlen kernels.

    These are the flash kernel in half precision, and the memory-efficient kernel, without a window, in fp32.
    A query sees at most `window` keys, including its own.
    """
    keys, values = segments.of_keys(k), segments.of_keys(v)
    if q.dtype == torch.float32:
        return _Efficient.apply(q, keys, values, segments, scale)  # type: ignore[return-value]
    return varlen_attn(
        q,
        keys,
        values,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **_GROUPED,
    )  # type: ignore[return-value]


class _Efficient(torch.autograd.Function):
    """The memory-efficient kernel over sequences; gradients are added in a fixed order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
        shared = q.shape[1] // k.shape[1]
        wide = [q, *(x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (k, v))]
        inputs = [x[None] for x in wide]
        bounds = segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_seqlen_q, segments.max_seqlen_k
        out, *rest = torch.ops.aten._efficient_attention_forward(
            *inputs, None, *bounds, 0.0, ALIGNED_AT_THE_END, True, scale=scale
        )
        ctx.save_for_backward(*inputs, out, *rest[:3])
        ctx.bounds, ctx.kv, ctx.scale = (*bounds[:2], *rest[3:]), k.shape[1], scale
        return out[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, sums, *drawn = ctx.saved_tensors
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            grad_outputs[0][None].contiguous(),
            *(q, k, v, None, out),
            *ctx.bounds,
            sums,
            0.0,
            *drawn,
            ALIGNED_AT_THE_END,
            False,
            num_splits_key=1,
            scale=ctx.scale,
        )
        if k.shape[2] > ctx.kv:
            dk, dv = (x.unflatten(2, (ctx.kv, -1)).sum(3) for x in (dk, dv))
        return dq[0], dk[0], dv[0], None, None
