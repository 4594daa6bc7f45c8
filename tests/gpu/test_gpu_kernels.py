"""Functions that are compiled to one kernel equal themselves as written; skipped without a GPU."""

import warnings

import pytest
import torch

from brushstroke.lowrank.apply import LinearParts
from brushstroke.step import onekernel
from brushstroke.step.mlp import GELU, GELU_TANH, SILU, Activation, mlp
from brushstroke.step.norm import rms_norm
from brushstroke.step.rotary import rotate

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
def test_one_kernel_equals_several(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (function, x) in functions(dtype).items():
        plain = outcome(function, x)
        with monkeypatch.context() as patch, warnings.catch_warnings(), onekernel.compiled(True):
            warnings.filterwarnings("error", message="torch.compile does not work")
            patch.setattr(onekernel, "LEAST_NUMBERS", 1)
            found = outcome(function, x)
        for a, b in zip(plain, found, strict=True):
            assert (a - b).float().norm() <= ROUNDING[dtype] * a.float().norm(), name
