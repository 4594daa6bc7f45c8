"""The packed step, banks and checkpoints on a GPU; skipped without one."""

from pathlib import Path

import pytest
import torch

import brushstroke as bs
from toys import random_adapter, tiny_gpt2, tiny_llama
from training_kit import examples, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
GRADIENT = 1e-3  # of a gradient tensor's norm, fp32: a GPU adds up in another order


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_step_has_the_gradients_of_the_cpu(make):
    found = []
    for device in ("cpu", "cuda"):
        with bs.Training(make().to(device), bs.LoraConfig(rank=4)) as run:
            randomise(run.parameters)
            run.forward_backward(examples())
            assert run.packed
            found.append([p.grad.cpu() for p in run.parameters])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= GRADIENT * theirs.norm()


def test_loaded_session_continues_to_the_same_bits(tmp_path: Path):
    with bs.Training(tiny_llama().cuda(), bs.LoraConfig(rank=4), learning_rate=1e-2) as run:
        run.forward_backward(examples())
        run.optim_step()
        run.save(tmp_path / "state")
        state = [p.detach().clone() for p in run.parameters]
    with bs.Training(tiny_llama().cuda(), bs.LoraConfig(rank=4)).load(tmp_path / "state") as run:
        assert all(torch.equal(a, b) for a, b in zip(state, run.parameters, strict=True))


def test_a_mixed_batch_equals_each_row_alone():
    model = tiny_llama().cuda()
    adapters = {"a": random_adapter(model, seed=1), "b": random_adapter(model, seed=2)}
    tokens = torch.randint(3, 60, (3, 7), device="cuda")
    with torch.no_grad(), bs.bank(model, adapters) as bank:
        with bank.rows(["a", None, "b"]):
            mixed = model(tokens).logits
        for row, name in enumerate(["a", None, "b"]):
            with bank.rows(name):
                torch.testing.assert_close(mixed[row], model(tokens[row : row + 1]).logits[0])
