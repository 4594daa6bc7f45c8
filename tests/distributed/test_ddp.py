"""Two gloo processes under DistributedDataParallel: the gradients of the whole batch in each."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import toys
from brushstroke.layers import attach

FLOAT32 = 1e-5  # relative: sums in another order

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 4, generator=generator)


def prepared():
    torch.manual_seed(0)
    net = toys.Mlp()
    adapter = toys.random_adapter(net)
    return net, attach(net, adapter, trainable=True)


def work(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    net, attachment = prepared()
    wrapped = DistributedDataParallel(net)
    x, y = (t[rank * 4 : rank * 4 + 4] for t in batch())
    (wrapped(x) - y).square().mean().backward()
    gradients = {name: p.grad for name, p in attachment.named_parameters()}
    assert net.fc1.weight.grad is None
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(2, port, str(tmp_path)), nprocs=2)
    net, attachment = prepared()
    x, y = batch()
    (net(x) - y).square().mean().backward()
    expected = {name: p.grad for name, p in attachment.named_parameters()}
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert list(got) == list(expected)
        for name, gradient in expected.items():
            assert ((got[name] - gradient).norm() / gradient.norm()).item() < FLOAT32
