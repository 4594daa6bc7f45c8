"""Half precision: the frozen product and the low-rank term are rounded once, as a sum."""

import copy

import pytest
import torch
from torch import Tensor, nn

import toys
from brushstroke.adapter import Adapter
from brushstroke.layers import attach, bank
from brushstroke.lowrank import LowRank

SMALL = 3e-4  # of V: the term is below half a step of bfloat16 at most outputs
KEPT = 0.05  # how far the kept part of ΔW's effect may be from 1, over some thousand outputs


class Net(nn.Module):
    """Two linear layers and a Conv1D, in bfloat16."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.plain = nn.Linear(48, 64, bias=False)
        self.biased = nn.Linear(48, 64)
        self.turned = Conv1D(64, 48)
        self.to(torch.bfloat16).eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.plain(x), self.biased(x), self.turned(x)], dim=-1)


@pytest.fixture(params=[False, True], ids=["frozen", "not frozen"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    return Net().requires_grad_(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 5, 48).bfloat16()


def small(net: nn.Module, seed: int = 0) -> Adapter:
    return toys.random_adapter(net, seed=seed, size=SMALL)


def kept(found: Tensor, base: Tensor, adapter: Adapter, x: Tensor) -> float:
    """The part of the adapter's exact effect that an output contains."""
    effect = torch.cat([x.double() @ u.dense().double() for u in adapter.values()], dim=-1)
    difference = (found.double() - base.double()).detach()
    return float((difference * effect).sum() / effect.square().sum())


def two_roundings(net: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    terms = [(x.double() @ u.dense().double()).bfloat16() for u in adapter.values()]
    return net(x) + torch.cat(terms, dim=-1)


def test_a_small_update_is_kept_where_two_roundings_lose_it(net, x):
    adapter, base = small(net), net(x)
    assert kept(two_roundings(net, adapter, x), base, adapter, x) < 0.9
    with attach(net, adapter):
        assert kept(net(x), base, adapter, x) == pytest.approx(1, abs=KEPT)


def test_dropout_keeps_it_too(net, x):
    adapter, base = small(net), net(x)
    with attach(net, adapter, trainable=True, dropout=0.5) as attachment, torch.no_grad():
        attachment.train()
        mean = torch.stack([net(x).double() for _ in range(60)]).mean(0)
    assert kept(mean, base, adapter, x) == pytest.approx(1, abs=3 * KEPT)


def test_rows_of_a_bank_keep_it_and_rows_of_the_base_are_the_base(net, x):
    adapters, base = {name: small(net, seed) for seed, name in enumerate("ab")}, net(x)
    with bank(net, adapters) as held:
        for names in (["a"], ["b"], [*"ab" * 8, *[None] * 16]):
            with held.rows(names):
                found = net(x)
            rows = names * (32 // len(names))
            for name in adapters:
                own = [i for i, row in enumerate(rows) if row == name]
                if own:
                    assert kept(found[own], base[own], adapters[name], x[own]) == pytest.approx(
                        1, abs=2 * KEPT
                    )
            none = [i for i, row in enumerate(rows) if row is None]
            assert torch.equal(found[none], base[none])


def test_rows_of_few_tokens_too(net):
    x, adapters = (
        torch.randn(96, 1, 48).bfloat16(),
        {name: small(net, seed) for seed, name in enumerate("ab")},
    )
    base, names = net(x), [*"ab" * 32, *[None] * 32]
    with bank(net, adapters) as held, held.rows(names):
        found = net(x)
    for name, adapter in adapters.items():
        own = [i for i, row in enumerate(names) if row == name]
        assert kept(found[own], base[own], adapter, x[own]) == pytest.approx(1, abs=5 * KEPT)
    assert torch.equal(found[64:], base[64:])


def test_an_update_of_zeros_gives_the_bits_of_the_base(net, x):
    expected = net(x)
    zeros = {p: LowRank(u.U, 0 * u.V, u.scale) for p, u in small(net).items() if isinstance(u, LowRank)}
    with attach(net, Adapter(zeros)) as attachment:
        assert torch.equal(net(x), expected)
        with attachment.disabled():
            assert torch.equal(net(x), expected)
    with bank(net, {"zeros": Adapter(zeros), "other": small(net)}) as held:
        with held.rows("zeros"):
            assert torch.equal(net(x), expected)
        with held.rows(["zeros", "other"] * 16):
            assert torch.equal(net(x)[::2], expected[::2])


def test_the_first_step_from_zeros_is_seen(net, x):
    zeros = {p: LowRank(u.U, 0 * u.V, u.scale) for p, u in small(net).items() if isinstance(u, LowRank)}
    with attach(net, Adapter(zeros), trainable=True) as attachment, torch.no_grad():
        base = net(x)
        for module in attachment.model.modules():
            if hasattr(module, "lora_V"):
                module.lora_V.data.normal_(std=SMALL)
        assert kept(net(x), base, attachment.adapter(), x) == pytest.approx(1, abs=KEPT)
        for module in attachment.model.modules():
            if hasattr(module, "lora_V"):
                module.lora_V.zero_()
        assert torch.equal(net(x), base)


def test_attaching_moves_no_weight(net, x):
    places = {name: (tensor, tensor.data_ptr()) for name, tensor in net.state_dict(keep_vars=True).items()}
    for put in (lambda: attach(net, small(net)), lambda: bank(net, {"a": small(net), "b": small(net)})):
        with put() as held:
            if hasattr(held, "use"):
                held.use("b")
            net(x)
            for name, (tensor, place) in places.items():
                assert net.get_parameter(name) is tensor
                assert tensor.data_ptr() == place


@pytest.mark.parametrize("through_data", [False, True])
def test_a_step_of_any_optimizer_is_seen(net, x, through_data):
    with attach(net, small(net), trainable=True) as attachment, torch.no_grad():
        net(x)
        for factor in attachment.parameters():
            (factor.data if through_data else factor).mul_(100)
        now = attachment.adapter()
        found = net(x)
    assert kept(found, net(x), now, x) == pytest.approx(1, abs=KEPT)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda net: net.float().bfloat16()])
def test_copies_and_converted_models_keep_it(net, x, move):
    adapter, base = small(net), net(x)
    with attach(net, adapter):
        net(x)
        found = move(net)(x)
    assert kept(found, base, adapter, x) == pytest.approx(1, abs=KEPT)


def test_gradients_are_those_of_fp32(net, x):
    adapter, wide = toys.random_adapter(net), copy.deepcopy(net).float()
    gradients = []
    for model, rows in ((net, x), (wide, x.float())):
        for dropout in (0.0, 0.3):
            torch.manual_seed(0)
            rows = rows.detach().requires_grad_(True)
            with attach(model, adapter, trainable=True, dropout=dropout, allow_different_base=True) as held:
                held.train()
                model(rows).float().square().mean().backward()
                gradients.append([rows.grad, *(p.grad for p in held.parameters())])
    half, single = gradients[:2], gradients[2:]
    for a, b in zip(half[0], single[0], strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.02
    assert all(g is not None and g.isfinite().all() for g in half[1])


def test_tied_weights_both_adapted_and_weights_in_a_shared_storage(x):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(48, 48, bias=False) for _ in range(2))
            self.sliced = nn.Linear(48, 48, bias=False)
            self.two.weight = self.one.weight
            self.bfloat16()
            self.sliced.weight.data = torch.randn(96, 48).bfloat16()[48:]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x), self.sliced(x)], dim=-1)

    net = Tied()
    before, state = net(x), copy.deepcopy(net.state_dict())
    sites = {path: LowRank(torch.randn(48, 2), torch.randn(2, 48)) for path in ("one", "sliced")}
    exact = before.detach().double()
    with attach(net, Adapter(sites)):
        found = net(x).double()
    for site, part in (("one", slice(0, 48)), ("sliced", slice(96, 144))):
        exact[..., part] += x.double() @ sites[site].dense().double()
    assert float((found.detach() - exact).norm() / exact.norm()) < 0.01
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert net.one.weight is net.two.weight
    assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :3],
        lambda x: x[:, -1:],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:, :1].expand(-1, 90, -1),
    ],
)
def test_rows_of_the_base_are_the_base_for_any_strides(net, view):
    x = view(torch.randn(32, 80, 48).bfloat16())
    layers = net.plain, net.biased  # Conv1D accepts contiguous inputs only
    base = [layer(x) for layer in layers]
    with bank(net, {"a": small(net)}) as held, held.rows(["a", None] * 16):
        for layer, expected in zip(layers, base, strict=True):
            assert torch.equal(layer(x)[1::2], expected[1::2])


def test_the_weight_may_change_before_backward_if_no_gradient_needs_it(x):
    net = Net()
    with attach(net, small(net)):
        y = net(x)
        with torch.no_grad():
            net.plain.weight.add_(1)
        y.float().sum().backward()
    assert net.plain.weight.grad is not None


def test_meta_tensors_run(net, x):
    with attach(net, small(net)):
        assert net.to("meta")(x.to("meta")).shape == (32, 5, 192)
