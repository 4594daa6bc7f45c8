"""The flash kernel for packed rows equals attention piece by piece; skipped without a GPU."""

import pytest
import torch
from torch import nn

import brushstroke as bs
from brushstroke.step.attend import by_segments
from brushstroke.step.attention import packed_attention
from brushstroke.step.layout import lay_out
from brushstroke.step.pack import plan_passes
from toys import tiny_llama
from training_kit import examples, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of a tensor's norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 2, 7])
@pytest.mark.parametrize(("heads", "kv", "width"), [(4, 4, 64), (6, 2, 128), (8, 1, 256)])
@pytest.mark.parametrize("share", [True, False])
def test_one_call_for_the_row_equals_the_pieces(dtype, window, heads, kv, width, share):
    (whole,) = plan_passes(examples(20), 10_000, share)
    layout = lay_out(whole, torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    n = sum(layout.sizes)
    shapes = [(1, h, n, width) for h in (heads, kv, kv)]
    q, k, v = (torch.randn(s, generator=generator, device="cuda", dtype=torch.float64) for s in shapes)
    grad = torch.randn(1, n, heads, width, generator=generator, device="cuda", dtype=torch.float64)
    found = []
    for kind in (torch.float64, dtype):
        inputs = [x.clone().to(kind).requires_grad_() for x in (q, k, v)]
        assert by_segments(inputs[0], inputs[2], 0.0) == (kind is dtype)
        out, _ = packed_attention(
            nn.Identity(), *inputs, None, brushstroke_layout=layout, sliding_window=window
        )
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(kind))])
    for exact, ours in zip(*found, strict=True):
        assert (exact - ours.double()).norm() <= ROUNDING[dtype] * exact.norm()


def test_dropout_and_full_precision_keep_the_pieces():
    x = torch.zeros(1, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert by_segments(x, x, 0.0)
    assert not by_segments(x, x, 0.1)
    assert not by_segments(x.float(), x.float(), 0.0)
    assert not by_segments(x[..., :12], x[..., :12], 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_packed_and_near_the_exact_one(dtype):
    found = []
    for kind, device in ((torch.float64, "cpu"), (dtype, "cuda")):
        with bs.Training(tiny_llama().to(device, kind), bs.LoraConfig(rank=4)) as run:
            randomise(run.parameters)
            result = run.forward_backward(examples())
            assert run.packed, run.step.forward_reason
            found.append([torch.tensor(result.loss), *(p.grad.cpu().double() for p in run.parameters)])
    for exact, ours in zip(*found, strict=True):
        assert (exact - ours).norm() <= 0.1 * exact.norm()


def test_two_runs_give_the_same_bits():
    found = []
    for _ in range(2):
        with bs.Training(
            tiny_llama().to("cuda", torch.bfloat16), bs.LoraConfig(rank=4), learning_rate=1e-2
        ) as run:
            for step in range(3):
                run.forward_backward(examples(seed=step))
                run.optim_step()
            found.append([p.detach().clone() for p in run.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
