"""Computes x·Wᵀ, alone or onto another term, with the kernels that are fastest on this processor.

In half precision a sum of two products is rounded once: `product_onto` adds its term inside the product,
where the sum is still in fp32. If x·W were rounded first, everything below half a step of its grid would be
lost from a low-rank term that is added to it.

Does not choose kernels for x·W per product: the caller chooses once with `choose_kernels`. Outside of
`kernels(...)`, `product` uses torch's kernels, so that an adapted model rounds like its base.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)  # the dtypes of half precision
BLOCK = 2**19  # numbers of W that are in fp32 at one time, if a processor has no products in half precision
_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

_kernels = "torch"


def choose_kernels(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernels for the products of a frozen base on a device, and the reason.

    "onednn": with AVX-512, oneDNN's fp32 products use the full vector width. MKL, torch's BLAS library, does
    so only on processors by Intel, where it is the faster of the two. "fp32": without products in half
    precision, torch computes them one by one; to convert blocks of W to fp32 is several times faster.
    "torch": torch's own kernels are as fast or faster.

    >>> choose_kernels(torch.device("cpu"), torch.float64)
    ('torch', 'the fastest kernels known for float64')
    """
    if device.type == "cpu" and dtype in HALF and not _has_products(dtype):
        return "fp32", f"this processor has no products in {_name(dtype)}"
    if device.type != "cpu" or dtype != torch.float32:
        where = _name(dtype) if device.type == "cpu" else device.type
        return "torch", f"the fastest kernels known for {where}"
    if not torch.cpu.get_capabilities().get("avx512_f"):
        return "torch", "the faster kernels for fp32 without AVX-512"
    if vendor() == "GenuineIntel":
        return "torch", "MKL has the faster kernels for fp32 on Intel"
    if not _usable():
        return "torch", "this build of torch has no oneDNN products"
    return "onednn", "the faster kernels for fp32 with AVX-512 on processors by others than Intel"


@cache
def vendor() -> str:
    """The maker of the processor, such as "GenuineIntel" or "AuthenticAMD"; empty if it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = [f"vendor_id : {platform.processor().split(',')[-1]}"]  # Windows: "…, GenuineIntel"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Context manager: `product` uses the kernels "onednn", "fp32" or "torch"."""
    global _kernels
    before, _kernels = _kernels, name
    try:
        yield
    finally:
        _kernels = before


def lacks_products(x: Tensor) -> bool:
    """Whether x is in half precision on a processor that has no products in it, so that fp32 is faster."""
    if x.dtype not in HALF or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not _has_products(x.dtype)


def in_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` uses oneDNN's kernels for these tensors."""
    single = x.dtype == weight.dtype == torch.float32
    return bool(_kernels == "onednn" and single and x.device.type == "cpu" and x.numel())


def product(
    x: Float[Tensor, "*b d"], weight: Float[Tensor, "h d"], bias: Float[Tensor, " h"] | None = None
) -> Float[Tensor, "*b h"]:
    """x·Wᵀ + bias without a gradient; the weight may be a transposed view, which is not copied.

    oneDNN's kernels are for fp32 on a CPU, the kernels "fp32" for half precision on a CPU; other inputs use
    torch's kernels.
    """
    if in_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, _contiguous(bias), "none", [], "")
    if _kernels == "fp32" and lacks_products(x) and weight.dtype == x.dtype:
        rows = x.reshape(-1, x.shape[-1])
        return _product_in_fp32(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def product_onto(
    total: Float[Tensor, "n h"],
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "h d"],
    bias: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "n h"]:
    """total + x·Wᵀ + bias, summed in at least fp32 and rounded once; may overwrite `total`."""
    if in_onednn(x, weight) and total.dtype == x.dtype:
        return torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, _contiguous(bias), "add")
    if lacks_products(x) and weight.dtype == x.dtype:
        return _product_in_fp32(x, weight, bias, total)
    if bias is None:
        return total.addmm_(x, weight.mT)
    if x.dtype not in HALF or weight.dtype != x.dtype:
        return total.add_(bias).addmm_(x, weight.mT)
    if x.is_cuda:
        wide = total.float().add_(bias)  # a sum in half precision would be rounded
        return torch.addmm(wide, x, weight.mT, out_dtype=torch.float32).to(x.dtype)
    traced = torch.compiler.is_compiling()  # which the private operator does not support
    if x.device.type == "cpu" and x.numel() and not traced and _adds_bias(x.dtype):
        return torch.ops.mkldnn._linear_pointwise.binary(x, total, weight, _contiguous(bias), "add")
    return _product_in_fp32(x, weight, bias, total)


def scaled_product(
    x: Float[Tensor, "n d"], y: Float[Tensor, "d h"], scale: float, dtype: torch.dtype
) -> Float[Tensor, "n h"]:
    """scale·x·y in a dtype; half precision on a GPU accumulates in fp32 if `dtype` is fp32."""
    if lacks_products(x) and y.dtype == x.dtype:
        return (scale * x.float() @ y.float()).to(dtype)
    if x.dtype == dtype:
        return x.new_empty(x.shape[0], y.shape[1]).addmm_(x, y, beta=0, alpha=scale)
    if x.is_cuda and x.dtype in HALF and dtype == torch.float32:
        ignored = x.new_empty((), dtype=dtype).expand(x.shape[0], y.shape[1])
        return torch.addmm(ignored, x, y, out_dtype=dtype, beta=0, alpha=scale)
    return scaled_product(x, y, scale, x.dtype).to(dtype)


def _product_in_fp32(
    x: Float[Tensor, "n d"],
    weight: Float[Tensor, "h d"],
    bias: Float[Tensor, " h"] | None = None,
    total: Float[Tensor, "n h"] | None = None,
) -> Float[Tensor, "n h"]:
    """total + x·Wᵀ + bias in the dtype of x; converts W to fp32 block by block, and rounds once."""
    rows, (h, d) = x.float(), weight.shape
    y = total if total is not None else x.new_empty(x.shape[0], weight.shape[0])
    step = max(1, BLOCK // max(d, 1))
    for start in range(0, h, step):
        columns = slice(start, start + step)
        own_bias = None if bias is None else bias[columns].float()
        block = F.linear(rows, weight[columns].float(), own_bias)
        y[:, columns] = block if total is None else block.add_(total[:, columns])
    return y


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()  # oneDNN's operators ignore its strides


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _has_products(dtype: torch.dtype) -> bool:
    """Whether this processor has fast products in this dtype of half precision."""
    supported = getattr(torch.ops.mkldnn, _SUPPORTED[dtype], None)
    return supported is None or bool(supported())


@cache
def _adds_bias(dtype: torch.dtype) -> bool:
    """Whether oneDNN's private operator adds a bias and a term to a product in this dtype, correctly."""
    x, weight = torch.linspace(-1, 1, 24).view(4, 6), torch.linspace(-1, 2, 18).view(3, 6)
    total, bias = torch.full((4, 3), 0.5), torch.linspace(1, 2, 3)
    half = [tensor.to(dtype) for tensor in (x, total, weight, bias)]
    try:
        found = torch.ops.mkldnn._linear_pointwise.binary(*half, "add")
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(found.float(), total + x @ weight.mT + bias, atol=0.1)


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
