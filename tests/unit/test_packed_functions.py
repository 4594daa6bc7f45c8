"""The fused norm, rotation and feed-forward block against plain operations."""

import pytest
import torch
import torch.nn.functional as F

from brushstroke.lowrank.apply import LinearParts, lowrank_linears, lowrank_term
from brushstroke.packed.mlp import GELU, GELU_TANH, SILU, mlp
from brushstroke.packed.norm import rms_norm
from brushstroke.packed.rotary import rotate

DOUBLE = {"dtype": torch.float64}
PLAIN = {SILU: F.silu, GELU: F.gelu, GELU_TANH: lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 8), (1, 4, 3, 8)])
def test_rms_norm_is_the_textbook_formula(shape, offset):
    x, weight = torch.randn(shape), torch.randn(8)
    x.requires_grad_(True)
    y = rms_norm(x, weight, 1e-5, offset)
    expected = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (weight + offset)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, direction)
    (wanted,) = torch.autograd.grad(expected, x, direction)
    torch.testing.assert_close(found, wanted)


def test_rms_norm_of_half_precision_is_computed_in_single():
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    exact = F.rms_norm(x.double(), (256,), weight.double(), 1e-6)
    error = (rms_norm(x, weight, 1e-6).double() - exact).norm() / exact.norm()
    assert error < 4e-3  # two roundings to bf16


@pytest.mark.parametrize("same_halves", [True, False])
def test_rotation_is_the_textbook_formula_and_its_gradient_turns_back(same_halves):
    x = torch.randn(2, 5, 3, 8, **DOUBLE, requires_grad=True)
    angles = torch.randn(1, 5, 1, 4 if same_halves else 8, **DOUBLE)
    angles = torch.cat([angles, angles], dim=-1) if same_halves else angles
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    expected = x * cos + torch.cat([-second, first], dim=-1) * sin
    torch.testing.assert_close(rotate(x, cos, sin), expected)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


def parts(d, h, rank, dxh=False, bias=True):
    weight = torch.randn(*((d, h) if dxh else (h, d)), **DOUBLE)
    factors = [torch.randn(rank, n, **DOUBLE, requires_grad=True) for n in (d, h)] if rank else [None, None]
    return LinearParts(weight, torch.randn(h, **DOUBLE) if bias else None, *factors, 0.7, dxh)


def apart(x, part):
    weight = part.weight.mT if part.weight_is_dxh else part.weight
    y = F.linear(x, weight, part.bias)
    return y if part.U_rows is None else y + lowrank_term(x, part.U_rows, part.V, part.scale)


def compare(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, leaves, direction),
        torch.autograd.grad(expected, leaves, direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def factors(linears):
    return [f for part in linears if part is not None for f in (part.U_rows, part.V) if f is not None]


@pytest.mark.parametrize("ranks", [(2, 3, 1), (2, 0, 3), (0, 0, 4)])
@pytest.mark.parametrize("dxh", [True, False])
def test_shared_input_projections_equal_separate_linears(ranks, dxh):
    x = torch.randn(2, 5, 6, **DOUBLE, requires_grad=True)
    linears = [parts(6, h, rank, dxh, bias=h == 4) for h, rank in zip((4, 3, 5), ranks, strict=True)]
    found, expected = lowrank_linears(x, linears), [apart(x, part) for part in linears]
    compare(
        torch.cat([y.flatten() for y in found]),
        torch.cat([y.flatten() for y in expected]),
        [x, *factors(linears)],
    )


@pytest.mark.parametrize("act", [SILU, GELU, GELU_TANH], ids=["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("ranks", [(2, 3, 1), (0, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_mlp_equals_its_three_linears(act, ranks, gated, keep):
    x = torch.randn(2, 5, 6, **DOUBLE, requires_grad=True)
    gate, up, down = parts(6, 9, ranks[0]) if gated else None, parts(6, 9, ranks[1]), parts(9, 6, ranks[2])
    plain = PLAIN[act]
    middle = plain(apart(x, gate)) * apart(x, up) if gate else plain(apart(x, up))
    compare(mlp(x, act, gate, up, down, keep), apart(middle, down), [x, *factors([gate, up, down])])


@pytest.mark.parametrize("keep", [True, False])
def test_mlp_saves_only_its_input_and_pre_activations(keep):
    saved = []
    x = torch.randn(50, 64, requires_grad=True)
    linears = [
        LinearParts(torch.randn(h, d), None, torch.randn(2, d, requires_grad=True), torch.randn(2, h))
        for d, h in ((64, 96), (64, 96), (96, 64))
    ]
    frozen = {part.weight.data_ptr() for part in linears}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(x, SILU, *linears, keep)
    kept = sum(t.numel() for t in saved if t.data_ptr() not in frozen and t.shape[0] == 50)
    assert kept == 50 * (64 + 2 * 96 * keep + 3 * 2)
