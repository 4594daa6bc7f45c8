"""Products by torch's kernels and by oneDNN's."""

import os
import subprocess
import sys

import pytest
import torch

from brushstroke.lowrank import matmul
from brushstroke.lowrank.matmul import choose_kernels, kernels, product, product_onto

CPU = torch.device("cpu")


@pytest.fixture
def onednn() -> None:
    if choose_kernels(CPU, torch.float32)[0] != "onednn":
        pytest.skip("no AVX-512: torch's kernels are the choice here")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "d", "h"), [(1, 5, 3), (7, 33, 65), (64, 16, 1), (0, 4, 4)])
def test_both_kernels_give_the_same_product(
    onednn: None, rows: int, d: int, h: int, transposed: bool
) -> None:
    x, bias = torch.randn(rows, d), torch.randn(h)
    weight = torch.randn(d, h).mT if transposed else torch.randn(h, d)
    total = torch.randn(rows, h)
    with kernels("onednn"):
        found = product(x, weight, bias), product_onto(total.clone(), x, weight)
    expected = x @ weight.mT + bias, total + x @ weight.mT
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_stay(onednn: None) -> None:
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    with kernels("onednn"):
        assert product(x, weight).shape == (2, 3, 5)


def test_a_bias_with_strides(onednn: None) -> None:
    x, weight, bias = torch.zeros(1, 2), torch.zeros(3, 2), torch.arange(6.0)[::2]
    with kernels("onednn"):
        assert torch.equal(product(x, weight, bias), bias[None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    assert choose_kernels(CPU, dtype)[0] in ("torch", "fp32")
    with kernels("onednn"):
        assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize(
    ("maker", "avx512", "expected"),
    [("GenuineIntel", True, "torch"), ("AuthenticAMD", False, "torch"), ("AuthenticAMD", True, "onednn")],
)
def test_kernels_for_fp32_by_maker_and_vector_width(monkeypatch, maker, avx512, expected) -> None:
    monkeypatch.setattr(matmul, "vendor", lambda: maker)
    monkeypatch.setattr(matmul, "_usable", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": avx512})
    assert choose_kernels(CPU, torch.float32)[0] == expected


HALF_TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("name", ["torch", "fp32"])
@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "d", "h"), [(7, 33, 65), (64, 700, 900), (0, 4, 4), (3, 0, 4)])
def test_a_sum_in_half_precision_is_rounded_once(name, dtype, biased, transposed, rows, d, h) -> None:
    x, bias = torch.randn(rows, d).to(dtype), 3 * torch.randn(h).to(dtype) if biased else None
    weight = (torch.randn(d, h).mT if transposed else torch.randn(h, d)).to(dtype)
    total = torch.randn(rows, h).to(dtype)
    exact = 0.25 * x.double() @ weight.double().mT + total.double() + (0 if bias is None else bias.double())
    with kernels(name):
        found = product_onto(total.clone(), 0.25 * x, weight, bias)
    assert found.dtype == dtype
    limit = HALF_TOLERANCE[dtype] * exact.abs() + 1e-6 * d**0.5  # half a step, and the rounding of fp32
    assert bool(((found.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
def test_products_in_fp32_blocks_are_rounded_once(dtype: torch.dtype) -> None:
    if choose_kernels(CPU, dtype)[0] != "fp32":
        pytest.skip("this processor has products in half precision")
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((2, 9, 700), (900, 700), (900,)))
    with kernels("fp32"):
        found = product(x, weight, bias)
    exact = x.double() @ weight.double().mT + bias.double()
    torch.testing.assert_close(found, exact.to(dtype), rtol=2 * HALF_TOLERANCE[dtype], atol=1e-3)


def test_kernel_choice_ends_with_its_block() -> None:
    x, weight = torch.randn(40, 50), torch.randn(60, 50)
    with pytest.raises(ZeroDivisionError), kernels("onednn"):
        raise ZeroDivisionError
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))


def test_kernel_caches_are_limited_unless_the_user_set_them() -> None:
    code = (
        "import os; from brushstroke.base.device import limit_kernel_caches as limit; limit(); "
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["9", "7"]
