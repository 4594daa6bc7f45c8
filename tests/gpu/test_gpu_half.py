"""Half precision on a GPU: the base's product and the term are rounded once; skipped without a GPU."""

import pytest
import torch
from torch import nn

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_small_update_is_kept(dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(256, 512, bias=bias)).to("cuda", dtype).requires_grad_(False)
    if bias:
        model[0].bias.fill_(3.0)
    x = torch.randn(512, 256, device="cuda", dtype=dtype)
    update = LowRank(torch.randn(256, 4), 3e-4 * torch.randn(4, 512), 1.0)
    effect = x.double().cpu() @ update.dense().double()
    base = model(x)
    with attach(model, Adapter({"0": update})):
        difference = (model(x).double() - base.double()).cpu()
    assert float((difference * effect).sum() / effect.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fresh_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(256, 512)).to("cuda", dtype)
    x = torch.randn(3, 700, 256, device="cuda", dtype=dtype)
    base = model(x)
    with attach(model, LoraConfig(rank=8, targets=["0"]), trainable=True):
        assert torch.equal(model(x), base)
