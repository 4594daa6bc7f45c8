"""Computes x·Wᵀ with torch's kernels, or with oneDNN's where they are faster on this processor.

Does not choose kernels per product: the caller chooses once with `choose_kernels`. Outside of
`kernels("onednn")` every product uses torch's kernels, so that an adapted model rounds like its base.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # the dtypes of half precision

_onednn = False


def choose_kernels(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernels for the products of a frozen base on a device, "onednn" or "torch", and the reason.

    With AVX-512, oneDNN's fp32 products use the full vector width; torch's BLAS library does so only on some
    processors. With AVX2, and in other dtypes, torch's kernels are as fast or faster.

    >>> choose_kernels(torch.device("cpu"), torch.float64)
    ('torch', 'the fastest kernels known for float64')
    """
    if device.type != "cpu" or dtype != torch.float32:
        where = str(dtype).removeprefix("torch.") if device.type == "cpu" else device.type
        return "torch", f"the fastest kernels known for {where}"
    if not torch.cpu.get_capabilities().get("avx512_f"):
        return "torch", "the faster kernels for fp32 without AVX-512"
    if not _usable():
        return "torch", "this build of torch has no oneDNN products"
    return "onednn", "the faster kernels for fp32 with AVX-512"


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Context manager: `product` uses the kernels "onednn" or "torch"."""
    global _onednn
    before, _onednn = _onednn, name == "onednn"
    try:
        yield
    finally:
        _onednn = before


def in_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` uses oneDNN's kernels for these tensors."""
    return bool(_onednn and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel())


def product(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "h d"], bias: Float[Tensor, " h"] | None = None
) -> Float[Tensor, "*b h"]:
    """x·Wᵀ + bias without a gradient; the weight may be a transposed view, which is not copied.

    oneDNN's kernels are for fp32 on a CPU; other inputs use torch's kernels.
    """
    if in_onednn(x, weight):
        bias = None if bias is None else bias.contiguous()  # the operator ignores its strides
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product_onto(
    total: Float[Tensor, "n h"], x: Float[Tensor, "n d"], weight: Float[Tensor, "h d"]
) -> Float[Tensor, "n h"]:
    """total + x·Wᵀ; may overwrite `total`."""
    if in_onednn(x, weight) and total.dtype == x.dtype:
        return torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, None, "add")
    return total.addmm_(x, weight.mT)


def scaled_product(
    x: Float[Tensor, "n d"], y: Float[Tensor, "d h"], scale: float, dtype: torch.dtype
) -> Float[Tensor, "n h"]:
    """scale·x·y in a dtype; half precision on a GPU accumulates in fp32 if `dtype` is fp32."""
    if x.dtype == dtype:
        return x.new_empty(x.shape[0], y.shape[1]).addmm_(x, y, beta=0, alpha=scale)
    if x.is_cuda and x.dtype in HALF and dtype == torch.float32:
        ignored = x.new_empty((), dtype=dtype).expand(x.shape[0], y.shape[1])
        return torch.addmm(ignored, x, y, out_dtype=dtype, beta=0, alpha=scale)
    return scaled_product(x, y, scale, x.dtype).to(dtype)


def _usable() -> bool:
    """Whether this build has the private operator and it computes correct results."""
    x, weight = torch.linspace(-1, 1, 24).view(4, 6), torch.linspace(-1, 2, 18).view(3, 6)
    try:
        with kernels("onednn"):
            computed = [
                product(x, weight),
                product(x, weight.mT.contiguous().mT),
                product_onto(x, x, weight.mT @ weight),
            ]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = [x @ weight.mT, x @ weight.mT, x + x @ weight.mT @ weight]
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(computed, expected, strict=True))
