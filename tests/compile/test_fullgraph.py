"""Compiled models: no graph break, and one graph for every route and every adapter loaded later.

The backend is aot_eager: inductor needs a C compiler, which the suite does not require.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import toys
from brushstroke.adapter import LoraConfig
from brushstroke.layers import attach, bank

FLOAT32 = 1e-5  # relative: sums in another order


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


def kinds() -> list[nn.Module]:
    return [toys.Mlp(), nn.Sequential(toys.Conv1D(4, 6))]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_training_step_is_one_graph(counter, kind, dropout):
    net = kinds()[kind]
    adapter = toys.random_adapter(net, LoraConfig(rank=2, targets=["fc1", "fc2"] if kind == 0 else ["0"]))
    x = torch.randn(5, 6)
    grads = []
    with attach(net, adapter, trainable=True, dropout=dropout) as attachment:
        net.train(dropout > 0)
        run = torch.compile(net, fullgraph=True, backend=counter)
        for model in (net, run):
            torch.manual_seed(1)
            for p in attachment.parameters():
                p.grad = None
            model(x).square().sum().backward()
            grads.append([p.grad.clone() for p in attachment.parameters()])
        optimiser = torch.optim.SGD(attachment.parameters(), lr=1e-2)
        before = run(x)
        for _ in range(3):
            optimiser.zero_grad()
            run(x).square().sum().backward()
            optimiser.step()
        if not dropout:
            assert not torch.equal(run(x), before)
    assert counter.frame_count == 1
    if not dropout:
        assert max(relative(b, a) for a, b in zip(*grads, strict=True)) < FLOAT32


def test_attaching_to_a_compiled_model_is_not_ignored(counter):
    net = toys.Mlp()
    run = torch.compile(net, fullgraph=True, backend=counter)
    x = torch.randn(5, 6)
    base = run(x)
    adapter = toys.random_adapter(net)
    with attach(run, adapter) as attachment:
        adapted = net(x)
        assert relative(run(x), adapted) < FLOAT32
        with attachment.disabled():
            assert relative(run(x), base) < FLOAT32
        assert relative(run(x), adapted) < FLOAT32
    assert relative(run(x), base) < FLOAT32
    assert relative(base, adapted) > 0.01


def test_one_graph_serves_every_route_and_every_adapter_loaded_later(counter):
    net = toys.Mlp()
    adapters = {n: toys.random_adapter(net, seed=i) for i, n in enumerate("ab")}
    x = torch.randn(4, 3, 6)
    later = [toys.random_adapter(net, LoraConfig(rank=r), seed=7 + r) for r in (4, 2, 3)]
    with bank(net, adapters) as b, torch.no_grad():
        run = torch.compile(net, fullgraph=True, backend=counter)

        def check(*names: str | None) -> None:
            with b.rows(names):
                assert relative(run(x), net(x)) < FLOAT32

        check("a", "b", None, "a")
        check(None, None, None, None)
        check("b", "b", "b", "b")
        check("b", "a", "b", None)
        b.load("a", later[0])
        check("a", "b", None, "a")
        b.load("c", later[1])
        check("a", "c", "b", "c")
        b.evict("b")
        b.load("d", later[2])
        check("a", "c", "d", "c")
        assert counter.frame_count == 1


def test_one_graph_serves_a_bank_of_dora_adapters(counter):
    net, x = toys.Mlp(), torch.randn(4, 3, 6)
    adapters = {}
    for name in "ab":
        with attach(net, LoraConfig(rank=2, variant="dora")) as attachment:
            for factor in attachment.parameters():
                factor.data += 0.3 * torch.randn(factor.shape)
            adapters[name] = attachment.adapter()
    with bank(net, adapters) as b, torch.no_grad():
        run = torch.compile(net, fullgraph=True, backend=counter)
        for names in (["a", "b", None, "a"], [None] * 4, ["b"] * 4):
            with b.rows(names):
                assert relative(run(x), net(x)) < FLOAT32
    assert counter.frame_count == 1


def test_a_compiled_bank_repeats_the_route_for_beams_and_refuses_other_batches(counter):
    net = toys.Mlp()
    with bank(net, {"a": toys.random_adapter(net)}) as b, torch.no_grad():
        run = torch.compile(net, fullgraph=True, backend=counter)
        x = torch.randn(6, 6)
        with b.rows(["a", None]):
            assert relative(run(x), net(x)) < FLOAT32
            with pytest.raises(Exception, match="route"):
                run(torch.randn(5, 6))


def test_one_route_of_one_row_serves_any_batch(counter):
    net = toys.Mlp()
    with bank(net, {"a": toys.random_adapter(net)}) as b, torch.no_grad(), b.rows("a"):
        run = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
        for rows in (3, 5, 8):
            x = torch.randn(rows, 6)
            assert relative(run(x), net(x)) < FLOAT32
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_language_model_serves_mixed_rows(llama, counter):
    adapters = {n: toys.random_adapter(llama, seed=i) for i, n in enumerate("ab")}
    tokens = torch.randint(0, toys.VOCABULARY, (3, 8))
    with bank(llama, adapters) as b, torch.no_grad():
        run = torch.compile(llama, fullgraph=True, backend=counter)
        for names in (["a", "b", None], ["b", None, "a"]):
            with b.rows(names):
                got = run(input_ids=tokens, use_cache=False).logits
                assert relative(got, llama(input_ids=tokens, use_cache=False).logits) < 1e-4
        assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_half_precision_with_a_bias_is_one_graph(counter, kind, dropout):
    model = kinds()[kind].bfloat16()
    x = torch.randn(8, 6).bfloat16()
    with attach(model, toys.random_adapter(model), trainable=True, dropout=dropout) as attachment:
        attachment.train()
        torch.manual_seed(1)
        expected = model(x).detach()
        torch.manual_seed(1)
        found = torch.compile(model, fullgraph=True, backend=counter)(x)
        found.float().sum().backward()
        assert all(p.grad is not None for p in attachment.parameters())
    assert counter.frame_count == 1
    assert relative(found.detach().float(), expected.float()) < 0.02
