"""Compiled functions equal the uncompiled ones; skipped without a GPU."""

import warnings

import pytest
import torch

from brushstroke.lowrank.apply import LinearParts
from brushstroke.lowrank.matmul import scaled_product
from brushstroke.packed import compiled as onekernel
from brushstroke.packed.mlp import GELU, GELU_TANH, SILU, Activation, mlp
from brushstroke.packed.norm import rms_norm
from brushstroke.packed.rotary import rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a tensor's norm


def outcome(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The value of a function, and the gradients of its first input."""
    x = inputs[0].clone().requires_grad_()
    y = function(x, *inputs[1:])
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, x, weights)]


def functions(dtype: torch.dtype):
    drawn = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    parts = [LinearParts(drawn(96, 64) / 8, None), LinearParts(drawn(96, 64) / 8, None)]
    down = LinearParts(drawn(64, 96) / 8, None)

    def block(act: Activation):
        return lambda x: mlp(x, act, *parts, down)

    x, gain, angles = drawn(1, 300, 64), drawn(64), drawn(1, 300, 1, 16)
    return {
        "RMSNorm": (lambda x: rms_norm(x, gain, 1e-5), x),
        "Gemma's": (lambda x: rms_norm(x, gain, 1e-6, 1.0), x),
        "rotation": (lambda x: rotate(x, angles, angles), drawn(1, 300, 4, 16)),
        **{f"{act.name} {act.options}": (block(act), x) for act in (SILU, GELU, GELU_TANH)},
    }


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_compiled_kernel_equals_separate_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (function, x) in functions(dtype).items():
        plain = outcome(function, x)
        with monkeypatch.context() as patch, warnings.catch_warnings(), onekernel.compiled(True):
            warnings.filterwarnings("error", message="torch.compile does not work")
            patch.setattr(onekernel, "LEAST_NUMBERS", 1)
            found = outcome(function, x)
        for a, b in zip(plain, found, strict=True):
            assert (a - b).float().norm() <= ROUNDING[dtype] * a.float().norm(), name


@pytest.mark.parametrize("shape", [(1, 300, 64), (1, 30, 4, 64)])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_torch_norm_equals_the_fused_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gain = torch.randn(shape, dtype=dtype), torch.randn(64, dtype=dtype)
    found = []
    for device in ("cpu", "cuda"):
        on = x.to(device).requires_grad_()
        y = rms_norm(on, gain.to(device), 1e-5)
        weights = torch.linspace(-1, 1, y.numel(), device=device).view(y.mT.shape).mT.to(dtype)
        found.append([z.cpu() for z in (y.detach(), *torch.autograd.grad(y, on, weights))])
        assert type(y.grad_fn).__name__.startswith("_RMSNorm") == (device == "cpu")
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).float().norm() <= ROUNDING[dtype] * ours.float().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_are_not_rounded_to_it(dtype: torch.dtype) -> None:
    x, y = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((300, 8), (300, 64)))
    exact = 0.3 * x.double().mT @ y.double()
    found = scaled_product(x.mT, y, 0.3, torch.float32)
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    rounded = scaled_product(x.mT, y, 0.3, dtype)
    assert rounded.dtype == dtype
    assert 1e-4 * exact.norm() < (rounded - exact).norm() <= 1e-2 * exact.norm()
