"""Several adapters in one model: every row gets its own, and detaching restores the base bit for bit."""

import copy

import pytest
import torch
from torch import nn

import toys
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.errors import AttachError, RouteError, ShapeError
from brushstroke.layers import attach, bank
from brushstroke.lowrank import LowRank
from brushstroke.merging import merge

EXACT = 1e-12  # float64, relative


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.fixture
def net() -> nn.Module:
    return toys.Mlp().double()


@pytest.fixture
def plain(net: nn.Module) -> nn.Module:
    """A copy that stays without a bank."""
    return copy.deepcopy(net)


@pytest.fixture
def adapters(net: nn.Module) -> dict[str, Adapter]:
    """Different ranks, scales and sets of sites."""
    configs = {
        "both": LoraConfig(rank=3, alpha=5),
        "first": LoraConfig(rank=1, targets=["fc1"]),
        "second": LoraConfig(rank=4, alpha=1, targets=["fc2"]),
    }
    return {
        name: toys.random_adapter(net, config, seed=i).to(torch.float64)
        for i, (name, config) in enumerate(configs.items())
    }


def alone(net: nn.Module, adapter: Adapter | None, x: torch.Tensor) -> torch.Tensor:
    """The dense oracle: weights with the update folded in, in float64."""
    dense = copy.deepcopy(net)
    with torch.no_grad():
        for path, update in (adapter or {}).items():
            dense.get_submodule(path).weight += update.dense().mT
        return dense(x)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("inner", [(), (5,), (2, 3)])
@pytest.mark.parametrize(
    "names",
    [
        ["both", "first", None, "second"],
        ["second", "second", "both", "both"],
        [None, "both", None, "both"],
        ["first"] * 4,
        [None] * 4,
    ],
)
def test_each_row_gets_its_own_adapter(net, adapters, plain, names, inner, grad):
    x = torch.randn(4, *inner, 6, dtype=torch.float64)
    expected = [alone(plain, adapters.get(name), x[i]) for i, name in enumerate(names)]
    with torch.set_grad_enabled(grad), bank(net, adapters) as b, b.rows(names):
        assert relative(net(x), torch.stack(expected)) < EXACT


def test_base_rows_equal_the_base_bit_for_bit(net, adapters):
    net = net.float()
    x = torch.randn(3, 5, 6)
    base = net(x)
    with bank(net, adapters, allow_different_base=True) as b:
        assert torch.equal(net(x), base)
        with b.rows([None, "both", None]):
            mixed = net(x)
        assert torch.equal(net(x), base)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])


@pytest.mark.parametrize("name", ["both", "first", "second", None])
def test_one_name_serves_any_batch(net, adapters, plain, name):
    x = torch.randn(7, 6, dtype=torch.float64)
    with bank(net, adapters) as b:
        for given in (name, [name]):
            with b.rows(given):
                assert relative(net(x), alone(plain, adapters.get(name), x)) < EXACT
                assert b.active == (name,)
        b.use(name)
        assert relative(net(x[:2]), alone(plain, adapters.get(name), x[:2])) < EXACT


@pytest.mark.parametrize("times", [2, 3])
def test_beams_and_flattened_tokens_repeat_the_route(net, adapters, times):
    x = torch.randn(2, 6, dtype=torch.float64)
    with bank(net, adapters) as b, b.rows(["both", "second"]):
        each = net(x)
        assert relative(net(x.repeat_interleave(times, 0)), each.repeat_interleave(times, 0)) < EXACT


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_wrong_number_of_rows_is_an_error(net, adapters, rows):
    x = torch.randn(rows, 6, dtype=torch.float64)
    with bank(net, adapters) as b, b.rows(["both", None]), pytest.raises(RouteError, match=f"batch {rows}"):
        net(x)


def test_unknown_names_and_empty_routes_are_errors(net, adapters):
    with bank(net, adapters) as b:
        with pytest.raises(RouteError, match="did you mean 'first'"), b.rows(["fisrt"]):
            pass
        with pytest.raises(RouteError, match="at least one row"), b.rows([]):
            pass
        with pytest.raises(RouteError, match="at least one row"):
            b.use()
        with pytest.raises(RouteError, match="name"):
            b.load("", adapters["both"])
        with pytest.raises(RouteError, match="no adapter 'x'"):
            b.evict("x")
        assert b.active == (None,)


def test_routes_nest_and_come_back_after_an_error(net, adapters):
    with bank(net, adapters) as b:
        with b.rows("both"):
            with pytest.raises(ZeroDivisionError), b.rows(["first", None]):
                _ = 1 / (b.active != ("first", None))
            assert b.active == ("both",)
        assert b.active == (None,)


def test_load_replace_and_evict(net, adapters, plain):
    x = torch.randn(3, 6, dtype=torch.float64)
    with bank(net) as b:
        assert b.names == ()
        b.load("a", adapters["first"])
        b.load("b", adapters["both"])
        with b.rows("a"):
            b.load("a", adapters["second"])
            assert relative(net(x), alone(plain, adapters["second"], x)) < EXACT
        assert b.card("a") is adapters["second"].card
        b.evict("b")
        assert b.names == ("a",)
        b.load("c", adapters["both"])
        b.load("d", adapters["first"])
        with b.rows(["c", "d", "a"]):
            expected = [alone(plain, adapters[n], x[i]) for i, n in enumerate(["both", "first", "second"])]
            assert relative(net(x), torch.stack(expected)) < EXACT


def test_an_adapter_in_use_is_not_evicted(net, adapters):
    with bank(net, adapters) as b:
        with b.rows(["both", None]), pytest.raises(RouteError, match="selected by the active route"):
            b.evict("both")
        with b.rows("both"), b.rows("first"), pytest.raises(RouteError, match="selected by the active route"):
            b.evict("both")
        b.evict("both")
        assert b.names == ("first", "second")


def test_the_bank_does_not_share_memory_with_the_value(net, adapters):
    kept = adapters["both"]["fc1"].dense().clone()
    with bank(net, adapters):
        net.fc1.bank_V.zero_()
    assert torch.equal(adapters["both"]["fc1"].dense(), kept)


def test_detach_restores_everything(language_model):
    before = toys.snapshot(language_model)
    adapters = {str(i): toys.random_adapter(language_model, seed=i) for i in range(3)}
    with bank(language_model, adapters) as b, b.rows(["0", "2"]):
        language_model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        with pytest.raises(AttachError, match="save_pretrained"):
            language_model.save_pretrained("nowhere")
    assert toys.snapshot(language_model) == before
    b.detach()
    assert toys.snapshot(language_model) == before


def test_a_class_changed_meanwhile_is_an_error(net, adapters):
    b = bank(net, adapters)
    adapted = type(net.fc2)
    net.fc2.__class__ = nn.Linear
    with pytest.raises(AttachError, match="fc2"):
        b.detach()
    net.fc2.__class__ = adapted
    b.detach()
    assert type(net.fc1) is type(net.fc2) is nn.Linear


def test_a_bank_and_an_attachment_exclude_each_other(net, adapters):
    with attach(net, adapters["first"]), pytest.raises(AttachError, match=r"detach it first.*bank"):
        bank(net, {"second": adapters["second"]})
    with bank(net, adapters), pytest.raises(AttachError, match="detach it first"):
        attach(net, adapters["first"])
    assert type(net.fc1) is nn.Linear


def test_loading_is_all_or_nothing(net, adapters):
    update = adapters["both"]["fc2"]
    wrong = Adapter({"fc2": update, "fc1": LowRank(torch.zeros(5, 1), torch.zeros(1, 10))})
    before = toys.snapshot(net)
    with pytest.raises(ShapeError, match="fc1"):
        bank(net, {"good": adapters["first"], "wrong": wrong})
    assert toys.snapshot(net) == before
    with bank(net, {"good": adapters["first"]}) as b:
        net.fc2.forward = net.fc2.forward
        with pytest.raises(AttachError, match="its own forward attribute"):
            b.load("both", adapters["both"])
        assert b.names == ("good",)
        assert type(net.fc2) is nn.Linear
        del net.fc2.forward
        b.load("both", adapters["both"])
    assert toys.snapshot(net) == before


def test_module_that_bypasses_the_adapter_is_refused():
    class Odd(nn.Linear):
        def __call__(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    net = nn.Sequential(Odd(6, 6))
    update = LowRank(torch.randn(6, 2), torch.randn(2, 6))
    with pytest.raises(AttachError, match=r"Odd.*does not run the adapted forward"):
        bank(net, {"a": Adapter({"0": update})})
    assert type(net[0]) is Odd


def test_shared_modules_have_one_entry_in_the_bank():
    net = nn.Sequential(nn.Linear(6, 6).double())
    net.append(net[0])
    update = LowRank(torch.randn(6, 2).double(), torch.randn(2, 6).double())
    x = torch.randn(2, 6, dtype=torch.float64)
    with bank(net, {"a": Adapter({"1": update}), "b": Adapter({"0": update})}) as b:
        with b.rows(["a", "b"]):
            mixed = net(x)
        with b.rows("a"):
            assert relative(net(x), mixed) < EXACT


def test_a_backward_under_another_route_raises(net, adapters):
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    with bank(net, adapters) as b:
        for names in (["both", None], "both", None):
            with b.rows(names):
                loss = net(x).sum()
            b.use("first")
            with pytest.raises(RouteError, match="before the route changes"):
                loss.backward()
            b.use(None)


def test_gradients_reach_the_input_through_mixed_rows(net, adapters):
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    expected = []
    for row, name in zip(x, ["both", "second"], strict=True):
        dense = copy.deepcopy(net)
        with torch.no_grad():
            for path, update in adapters[name].items():
                dense.get_submodule(path).weight += update.dense().mT
        expected.append(torch.autograd.grad(dense(row).square().sum(), x)[0].sum(0))
    with bank(net, adapters) as b, b.rows(["both", "second"]):
        (dx,) = torch.autograd.grad(net(x).square().sum(), x)
    assert relative(dx, torch.stack(expected)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(adapters, dtype):
    net = toys.Mlp(32, 64, 16).to(dtype)
    adapter = toys.random_adapter(net)
    x = torch.randn(4, 32).to(dtype)
    with attach(net, adapter):
        expected = net(x)
    with bank(net, {"a": adapter}) as b, b.rows(["a", None, "a", "a"]):
        assert relative(net(x)[[0, 2, 3]].float(), expected[[0, 2, 3]].float()) < 0.02


def test_a_deep_copy_keeps_its_own_route(net, adapters, plain):
    x = torch.randn(2, 6, dtype=torch.float64)
    with bank(net, adapters) as b:
        b.use("both", None)
        twin = copy.deepcopy(net)
        b.use(None)
        assert relative(twin(x)[:1], alone(plain, adapters["both"], x[:1])) < EXACT


def answers(model: nn.Module, prompts: torch.Tensor, **settings) -> torch.Tensor:
    return model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False, **settings
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_mixed_rows_is_generating_with_merged_models(language_model, beams):
    model = language_model
    adapters = {n: toys.random_adapter(model, seed=i + 1, size=0.4) for i, n in enumerate("ab")}
    prompts = torch.randint(2, toys.VOCABULARY, (4, 5))
    names = ["a", None, "b", "a"]
    settings = {"num_beams": beams, "num_return_sequences": beams}
    merged = {None: model} | {name: merge(model, adapter) for name, adapter in adapters.items()}
    expected = [answers(merged[n], prompts[i : i + 1], **settings) for i, n in enumerate(names)]
    with bank(model, adapters) as b:
        with b.rows(names):
            mixed = answers(model, prompts, **settings)
        assert torch.equal(answers(model, prompts[1:2], **settings), expected[1])
    assert torch.equal(mixed, torch.cat(expected))
    assert not torch.equal(expected[0][:, 5:], answers(model, prompts[:1], **settings)[:, 5:])


def test_small_and_large_batches_give_the_same_results(net, adapters, monkeypatch) -> None:
    x = torch.randn(4, 5, 6).double()
    with bank(net, adapters) as loaded, loaded.rows(["both", None, "second", "first"]), torch.no_grad():
        few = net(x)
        monkeypatch.setattr("brushstroke.layers.linear.STACKED_ROWS", 0)
        assert relative(net(x), few) < EXACT


def test_non_finite_values_in_the_base_dtype_are_refused(net, adapters) -> None:
    broken = Adapter({"fc1": LowRank(torch.ones(6, 1), torch.full((1, 10), 1e6), 1.0)})
    net.half()
    with bank(net) as loaded:
        with pytest.raises(AttachError, match=r"non-finite values at fc1 in torch\.float16"):
            loaded.load("broken", broken)
        assert loaded.names == ()


@pytest.mark.parametrize("names", [["two"], ["two", "one"], [None, "two"]])
def test_a_site_that_is_adapted_after_others_serves_all_slots(net, adapters, names):
    """The stacks of a site have room for every slot, not only for those of its own adapters."""
    x = torch.randn(4, 3, 6).double()
    with bank(net, {"one": adapters["first"], "two": adapters["first"]}) as b:
        b.load("one", adapters["both"])
        with b.rows(names * (4 // len(names))):
            found = net(x)
    for i, name in enumerate(names * (4 // len(names))):
        adapter = {"one": adapters["both"], "two": adapters["first"], None: None}[name]
        assert relative(found[i], alone(net, adapter, x[i : i + 1])[0]) < EXACT


class Routed(nn.Module):
    """Two experts; the sign of the first number chooses one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[first], y[~first] = self.experts[0](x[first]), self.experts[1](x[~first])
        return y


def test_experts_refuse_rows_of_different_adapters():
    net, x = Routed(), torch.randn(2, 6, 4)
    adapter = toys.random_adapter(net)
    with attach(net, adapter):
        expected = net(x)
    with bank(net, {"a": adapter}) as held:
        with held.rows("a"):
            torch.testing.assert_close(net(x), expected)
        with held.rows(["a", None]), pytest.raises(RouteError, match="is an expert: it gets the tokens that"):
            net(x)
