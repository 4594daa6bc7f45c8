"""The varlen kernel for packed rows equals attention block by block; skipped without a GPU."""

import pytest
import torch
from torch import nn

import brushstroke as bs
from brushstroke.packed.attention import packed_attention
from brushstroke.packed.layout import build_layout
from brushstroke.packed.pack import Row, plan_passes
from brushstroke.packed.sdpa import by_segments
from toys import tiny_llama
from training_kit import examples, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 3e-6}  # of a tensor's norm


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("window", [None, 2, 7])
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 4, 64), (6, 2, 128), (8, 1, 256)])
@pytest.mark.parametrize("share", [True, False])
def test_one_call_for_the_row_equals_the_pieces(dtype, window, heads, kv, width, share):
    (whole,) = plan_passes([Row.of(example) for example in examples(20)], 10_000, share)
    layout = build_layout(whole, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    n = sum(layout.sizes)
    shapes = [(1, h, n, width) for h in (heads, kv, kv)]
    q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=torch.float64) for s in shapes)
    grad = torch.randn(1, n, heads, width, generator=generator, device="cuda", dtype=torch.float64)
    found = []
    for kind in (torch.float64, dtype):
        inputs = [x.clone().to(kind).requires_grad_() for x in (q, k, v)]
        half = kind in (torch.bfloat16, torch.float16)
        expected = half or (kind is torch.float32 and window is None)
        assert by_segments(inputs[0], inputs[2], 0.0, window is not None) == expected
        out, _ = packed_attention(
            nn.Identity(), *inputs, None, brushstroke_layout=layout, sliding_window=window
        )
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(kind))])
    for exact, ours in zip(*found, strict=True):
        assert (exact - ours.double()).norm() <= ROUNDING[dtype] * exact.norm()


def test_unsupported_varlen_cases_use_blocks():
    x = torch.zeros(1, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert by_segments(x, x, 0.0, False)
    assert not by_segments(x, x, 0.1, False)
    assert by_segments(x, x, 0.0, True)
    assert by_segments(x.float(), x.float(), 0.0, False)
    assert not by_segments(x.float(), x.float(), 0.0, True)
    assert not by_segments(x.double(), x.double(), 0.0, False)
    assert not by_segments(x[..., :12], x[..., :12], 0.0, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_step_is_packed_and_close_to_fp32(dtype):
    found = []
    for kind, device in ((torch.float64, "cpu"), (dtype, "cuda")):
        with bs.Training(tiny_llama().to(device, kind), bs.LoraConfig(rank=4)) as run:
            randomise(run.parameters)
            result = run.forward_backward(examples())
            assert run.packed, run.step.forward_reason
            found.append([torch.tensor(result.loss), *(p.grad.cpu().double() for p in run.parameters)])
    for exact, ours in zip(*found, strict=True):
        assert (exact - ours).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_two_runs_give_the_same_bits(dtype):
    found = []
    for _ in range(2):
        with bs.Training(tiny_llama().to("cuda", dtype), bs.LoraConfig(rank=4), learning_rate=1e-2) as run:
            for step in range(3):
                run.forward_backward(examples(seed=step))
                run.optim_step()
            found.append([p.detach().clone() for p in run.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
