"""One adapter in a live model: results and refusals of attach, and what detach restores."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import toys
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.errors import (
    AttachError,
    BaseMismatchError,
    ConfigError,
    RouteError,
    ShapeError,
    TargetError,
)
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank
from brushstroke.sites import find_sites

EXACT = 1e-12  # float64, relative
FLOAT32 = 1e-5  # float32, relative: sums in another order
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(6,), (0, 6), (5, 6), (2, 3, 6), (2, 2, 3, 6), (1, 1, 6)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def kinds(dtype: torch.dtype = torch.float64) -> dict[str, nn.Module]:
    return {
        "linear": nn.Sequential(nn.Linear(6, 4)).to(dtype),
        "no bias": nn.Sequential(nn.Linear(6, 4, bias=False)).to(dtype),
        "conv1d": nn.Sequential(toys.Conv1D(4, 6)).to(dtype),
    }


# What it computes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(dtype, kind, shape, dropout):
    net = kinds(dtype)[kind].train()
    x = torch.randn(shape, dtype=dtype)
    base = net(x)
    with attach(net, LoraConfig(rank=2, targets=["0"], dropout=dropout), trainable=True):
        assert torch.equal(net(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_for_inputs_that_are_not_contiguous(dtype):
    net = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    x = torch.randn(5, 7, 64, dtype=dtype).transpose(0, 1)
    base = net(x)
    with attach(net, LoraConfig(rank=2)):
        assert torch.equal(net(x), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_in_a_language_model(language_model, dtype):
    model = language_model.to(dtype)
    tokens = torch.randint(0, toys.VOCABULARY, (2, 9))
    base = model(tokens).logits
    with attach(model, LoraConfig(rank=4), trainable=True):
        assert torch.equal(model(tokens).logits, base)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_is_that_of_the_dense_sum(kind, shape):
    net = kinds()[kind]
    adapter = toys.random_adapter(net, LoraConfig(rank=3, alpha=5, targets=["0"])).to(torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    expected = net(x) + x @ adapter["0"].dense()
    with attach(net, adapter):
        assert net(x).shape == expected.shape
        assert relative(net(x), expected) < EXACT


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_follow_from_the_dense_gradient(kind, shape, trainable):
    """dU = scale·G·Vᵀ and dV = scale·Uᵀ·G with G = ∂L/∂(W + ΔW): the oracle of arXiv:2106.09685."""
    net = kinds()[kind].requires_grad_(False)
    adapter = toys.random_adapter(net, LoraConfig(rank=3, alpha=5, targets=["0"])).to(torch.float64)
    update = adapter["0"]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dense = copy.deepcopy(net)
    with torch.no_grad():
        delta = update.dense()
        dense[0].weight += delta if kind == "conv1d" else delta.mT
    dense[0].weight.requires_grad_(True)
    target = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    ((dense(x) - target) ** 2).sum().backward()
    G = dense[0].weight.grad if kind == "conv1d" else dense[0].weight.grad.mT
    dx, x.grad = x.grad, None

    with attach(net, adapter, trainable=trainable) as attachment:
        factors = dict(attachment.named_parameters())
        assert all(p.requires_grad == trainable for p in factors.values())
        ((net(x) - target) ** 2).sum().backward()
        torch.testing.assert_close(x.grad, dx, rtol=1e-10, atol=1e-12)
        assert net[0].weight.grad is None
        if trainable:
            dU, dV = factors["0.lora_U_rows"].grad.mT, factors["0.lora_V"].grad
            torch.testing.assert_close(dU, update.scale * G @ update.V.mT, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(dV, update.scale * update.U.mT @ G, rtol=1e-10, atol=1e-12)
            # Balance: Uᵀ·dU = dV·Vᵀ.
            torch.testing.assert_close(update.U.mT @ dU, dV @ update.V.mT, rtol=1e-9, atol=1e-12)


def test_the_unfused_path_gives_the_same_gradients():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled(6, 4)).double().requires_grad_(False)
    adapter = toys.random_adapter(net, LoraConfig(rank=3, targets=["0"])).to(torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    U, V = (t.clone().requires_grad_(True) for t in (adapter["0"].U, adapter["0"].V))
    expected = net(x) + adapter["0"].scale * (x @ U) @ V
    expected.square().sum().backward()
    with attach(net, adapter, trainable=True) as attachment:
        net(x).square().sum().backward()
        factors = dict(attachment.named_parameters())
        assert relative(factors["0.lora_U_rows"].grad.mT, U.grad) < EXACT
        assert relative(factors["0.lora_V"].grad, V.grad) < EXACT
        assert net[0].weight.grad is None


def test_factors_are_float32_over_a_bfloat16_base():
    net = toys.Mlp(32, 64, 16).bfloat16()
    wide = copy.deepcopy(net).float()
    adapter = toys.random_adapter(net)
    x = torch.randn(20, 32).bfloat16()
    grads = []
    for model in (net, wide):
        with attach(model, adapter, trainable=True, allow_different_base=True) as attachment:
            assert all(p.dtype == torch.float32 for p in attachment.parameters())
            model(x.to(model.fc1.weight.dtype)).float().square().mean().backward()
            grads.append([p.grad for p in attachment.parameters()])
    assert all(g.dtype == torch.float32 for g in grads[0])
    assert max(relative(a, b) for a, b in zip(*grads, strict=True)) < 0.03  # bf16 keeps 8 bits


def test_training_moves_the_factors_and_not_one_byte_of_the_base():
    net = toys.Mlp()
    before = toys.snapshot(net)
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    with attach(net, LoraConfig(rank=3, alpha=6), trainable=True) as attachment:
        optimiser = torch.optim.AdamW(attachment.parameters(), lr=1e-2, weight_decay=0.1)
        losses = []
        for _ in range(20):
            optimiser.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            assert all(p.grad is None for n, p in net.named_parameters() if "lora" not in n)
        assert losses[-1] < losses[0]
        trained = attachment.adapter()
    assert toys.snapshot(net) == before
    assert trained.norm() > 0


def test_at_v_zero_only_v_has_a_gradient():
    net = toys.Mlp()
    with attach(net, LoraConfig(rank=3), trainable=True) as attachment:
        net(torch.randn(5, 6)).square().sum().backward()
        for name, p in attachment.named_parameters():
            assert bool((p.grad != 0).any()) == name.endswith("lora_V")


def test_low_rank_training_reaches_the_reduced_rank_optimum():
    """W0 + SVD_r((W_ls − W0) after whitening): the optimum of rank r on least squares."""
    n, d, h, r = 64, 6, 5, 2
    x = torch.randn(n, d, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(d, h, bias=False)).double()
    W0 = net[0].weight.detach().mT.clone()
    y = x @ torch.randn(d, h, dtype=torch.float64) + 0.1 * torch.randn(n, h, dtype=torch.float64)
    R = torch.linalg.qr(x).R
    W_ls = torch.linalg.lstsq(x, y).solution
    left, sigma, right = torch.linalg.svd(R @ (W_ls - W0), full_matrices=False)
    best = W0 + torch.linalg.solve(R, (left[:, :r] * sigma[:r]) @ right[:r])
    optimum = float((x @ best - y).square().sum())
    with attach(net, LoraConfig(rank=r, alpha=r, targets=["0"]), trainable=True) as attachment:
        optimiser = torch.optim.LBFGS(
            list(attachment.parameters()), max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14
        )

        def closure():
            optimiser.zero_grad()
            loss = (net(x) - y).square().sum()
            loss.backward()
            return loss.detach()

        optimiser.step(closure)
        assert closure().item() == pytest.approx(optimum, rel=1e-6)


def test_scaling_by_powers_of_two_keeps_the_trajectory_bit_for_bit():
    """(alpha/(p·q), p·U, learning rates p and q) is the same run; p, q powers of two, Adam's eps near 0."""
    results = []
    for p, q in [(1.0, 1.0), (4.0, 2.0)]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 4))
        x, y = torch.randn(16, 6), torch.randn(16, 4)
        start = toys.random_adapter(net, LoraConfig(rank=2, targets=["0"]), size=0.0)["0"]
        scaled = LowRank(p * start.U, start.V, start.scale / (p * q))
        with attach(net, Adapter({"0": scaled}), trainable=True) as attachment:
            named = dict(attachment.named_parameters())
            groups = [
                {"params": [named["0.lora_U_rows"]], "lr": 1e-2 * p},
                {"params": [named["0.lora_V"]], "lr": 1e-2 * q},
            ]
            optimiser = torch.optim.Adam(groups, eps=1e-38)
            for _ in range(5):
                optimiser.zero_grad()
                (net(x) - y).square().mean().backward()
                optimiser.step()
            results.append(attachment.adapter()["0"].dense())
    assert torch.equal(*results)


def test_dropout_acts_only_on_the_low_rank_path_and_keeps_the_mean():
    net = nn.Sequential(nn.Linear(64, 8))
    adapter = toys.random_adapter(net, LoraConfig(rank=4, targets=["0"]), size=1.0)
    x = torch.randn(1, 64)
    plain = net(x)
    expected = adapter["0"].apply(x)
    with attach(net, adapter, trainable=True, dropout=0.25):
        net.train()
        drawn = torch.cat([net(x) for _ in range(4000)]) - plain
        assert relative(drawn.mean(0, keepdim=True), expected) < 0.05
        kept = x.expand(4000, -1)
        spread = (adapter["0"].dense().square() * kept[0, :, None].square()).sum(0) * (0.25 / 0.75)
        assert relative(drawn.var(0), spread) < 0.1
        net.eval()
        assert relative(net(x), plain + expected) < FLOAT32


def test_autocast_computes_in_low_precision_with_float32_gradients():
    net = toys.Mlp(32, 64, 16)
    adapter = toys.random_adapter(net)
    x = torch.randn(20, 32)
    grads, outputs = [], []
    for enabled in (False, True):
        with attach(net, adapter, trainable=True) as attachment:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = net(x)
            outputs.append(y)
            y.float().square().mean().backward()
            grads.append([p.grad for p in attachment.parameters()])
    assert outputs[1].dtype == torch.bfloat16
    assert relative(outputs[1].float(), outputs[0]) < 0.03
    assert all(g.dtype == torch.float32 for g in grads[1])
    assert max(relative(b, a) for a, b in zip(*grads, strict=True)) < 0.05


def test_autocast_starts_from_the_base_bit_for_bit():
    net = toys.Mlp(32, 64, 16)
    x = torch.randn(20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        base = net(x)
        with attach(net, LoraConfig(rank=4), trainable=True):
            assert torch.equal(net(x), base)


def test_a_second_derivative_is_an_error():
    net = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with attach(net, toys.random_adapter(net).to(torch.float64), trainable=True):
        for value in (net(x).square().sum(), net(x).sum()):  # of a sum torch itself would tell nobody
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    net = toys.Mlp().double()
    adapter = toys.random_adapter(net).to(torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        with attach(net, adapter, trainable=True) as attachment:
            run(x).square().sum().backward()
            grads.append([p.grad for p in attachment.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_shared_module_is_adapted_once():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.Linear(6, 6)
            self.again = self.step
            self.stack = nn.ModuleList([self.step])

        def forward(self, x):
            return self.stack[0](torch.tanh(self.again(torch.tanh(self.step(x)))))

    net = Recurrent().double()
    (site,) = find_sites(net)
    assert site.paths == ("step", "again", "stack.0")
    adapter = toys.random_adapter(net, LoraConfig(rank=2, targets=["again"])).to(torch.float64)
    assert list(adapter) == ["step"]
    dense = copy.deepcopy(net)
    with torch.no_grad():
        dense.step.weight += adapter["step"].dense().mT
    x = torch.randn(4, 6, dtype=torch.float64)
    for named in (adapter, Adapter({"stack.0": adapter["step"]})):
        with attach(net, named, trainable=True) as attachment:
            assert attachment.sites == ("step",)
            y = net(x)
            assert relative(y, dense(x)) < EXACT
            y.square().sum().backward()
            dense.zero_grad()
            dense(x).square().sum().backward()
            G = dense.step.weight.grad.mT
            update = adapter["step"]
            dV = dict(attachment.named_parameters())["step.lora_V"].grad
            assert relative(dV, update.scale * update.U.mT @ G) < 1e-10


def test_two_updates_for_one_shared_module_are_refused():
    net = nn.ModuleDict({"a": nn.Linear(6, 6)})
    net["b"] = net["a"]
    update = LowRank(torch.randn(6, 2), torch.randn(2, 6))
    with pytest.raises(ShapeError, match="it is the same module as a"):
        attach(net, Adapter({"a": update, "b": update}))


# The route


def test_disabled_is_the_base_bit_for_bit():
    net = toys.Mlp()
    x = torch.randn(5, 6)
    base = net(x)
    with attach(net, toys.random_adapter(net)) as attachment:
        adapted = net(x)
        assert not torch.equal(adapted, base)
        with attachment.disabled():
            assert torch.equal(net(x), base)
        assert torch.equal(net(x), adapted)


@pytest.mark.parametrize("backward_disabled", [True, False])
def test_a_backward_under_another_route_raises(backward_disabled):
    net = toys.Mlp()
    x = torch.randn(5, 6, requires_grad=True)
    with attach(net, toys.random_adapter(net), trainable=True) as attachment:
        if backward_disabled:
            loss = net(x).sum()
            with attachment.disabled(), pytest.raises(RouteError, match="before the route changes"):
                loss.backward()
        else:
            with attachment.disabled():
                loss = net(x).sum()
            with pytest.raises(RouteError, match="before the route changes"):
                loss.backward()


@pytest.mark.parametrize("backward_disabled", [True, False])
def test_a_checkpointed_backward_under_another_route_raises(backward_disabled):
    """Only without reentrance: the other kind runs its forward with gradients off, so nothing can be kept."""
    net = toys.Mlp()
    x = torch.randn(5, 6, requires_grad=True)
    with attach(net, toys.random_adapter(net), trainable=True) as attachment:
        if backward_disabled:
            loss = checkpoint(net, x, use_reentrant=False).sum()
            with attachment.disabled(), pytest.raises(RouteError, match="the route"):
                loss.backward()
        else:
            with attachment.disabled():
                loss = checkpoint(net, x, use_reentrant=False).sum()
            with pytest.raises(RouteError, match="the route"):
                loss.backward()


# Detaching


@pytest.mark.parametrize("trainable", [True, False])
def test_detach_restores_everything(language_model, trainable):
    model = language_model
    next(iter(model.parameters())).requires_grad_(False)
    before = toys.snapshot(model)
    attachment = attach(model, LoraConfig(rank=4), trainable=trainable)
    assert toys.snapshot(model) != before
    for p in attachment.parameters():
        p.data.add_(1.0)
    model(torch.tensor([[1, 2, 3]]))
    attachment.detach()
    assert toys.snapshot(model) == before


def test_failed_attach_changes_nothing():
    class Odd(nn.Linear):
        def __call__(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    net = nn.Sequential(nn.Linear(6, 6), Odd(6, 6))
    before = toys.snapshot(net)
    for trainable in (True, False):
        with pytest.raises(AttachError, match="Odd"):
            attach(net, LoraConfig(rank=2, targets=["0", "1"]), trainable=trainable)
        assert toys.snapshot(net) == before


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y.sigmoid(), y


class Heads(nn.Linear):
    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))


class Gated(nn.Linear):
    def forward(self, x, gate):
        return gate * super().forward(x)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Router, "Router returns a tuple, not a tensor"),
        (Heads, r"Heads returns \(2, 2, 2\) for rows of 4"),
        (Gated, r"Gated fails in a trial on rows of 4 \(TypeError"),
    ],
)
def test_groups_skip_modules_without_tensor_output_and_advice_works(cls, why):
    net = nn.ModuleDict({"mlp": nn.ModuleDict({"router": cls(4, 4), "up_proj": nn.Linear(4, 8)})})
    before = toys.snapshot(net)
    for targets in ("all-linear", "mlp"):
        with attach(net, LoraConfig(rank=1, targets=targets)) as attachment:
            assert attachment.sites == ("mlp.up_proj",)
            assert list(attachment.plan.skipped) == ["mlp.router"]
            assert re.search(why, attachment.plan.skipped["mlp.router"])
    for targets in ("router", "mlp.router", r"mlp\..*"):
        with pytest.raises(
            TargetError, match=rf"mlp.router cannot be adapted: {why}.*leave it out, as the groups"
        ):
            attach(net, LoraConfig(rank=1, targets=targets))
    assert toys.snapshot(net) == before


def test_module_without_tensor_output_is_refused():
    update = LowRank(torch.zeros(4, 1), torch.zeros(1, 4))
    net = nn.Sequential(Router(4, 4))
    before = toys.snapshot(net)
    with pytest.raises(AttachError, match=r"0 \(Router\) returns a tuple, not a tensor"):
        attach(net, Adapter({"0": update}))
    assert toys.snapshot(net) == before


def test_the_router_of_llama_4_is_left_out_with_its_experts():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
    )
    model = Llama4ForCausalLM(config)
    for targets in ("all-linear", ("attention", "mlp")):
        with attach(model, LoraConfig(rank=2, targets=targets), trainable=True) as attachment:
            assert not [path for path in attachment.sites if "router" in path]
            model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
            assert all(p.grad is not None for p in attachment.parameters())
            skipped = attachment.plan.skipped
    assert "not a tensor" in skipped["model.layers.1.feed_forward.router"]
    assert skipped["model.layers.1.feed_forward.experts.down_proj"] == (
        "a bare 3-D parameter, which cannot be adapted yet"
    )


def test_the_probe_sees_a_bypass_even_for_a_faint_adapter():
    class Odd(nn.Linear):
        def __call__(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    faint = LowRank(1e-7 * torch.randn(6, 2), torch.randn(2, 6), 0.01)
    with pytest.raises(AttachError, match="does not run the adapted forward"):
        attach(nn.Sequential(Odd(6, 6)), Adapter({"0": faint}))


def test_the_adapter_of_an_attachment_is_a_snapshot():
    net = toys.Mlp()
    attachment = attach(net, LoraConfig(rank=2), trainable=True)
    before = attachment.adapter()
    kept = {path: update.dense().clone() for path, update in before.items()}
    for p in attachment.parameters():
        p.data.add_(1.0)
    assert all(torch.equal(before[path].dense(), kept[path]) for path in kept)
    assert not torch.equal(attachment.adapter()["fc1"].dense(), kept["fc1"])
    attachment.detach()
    with pytest.raises(AttachError, match="detached already"):
        attachment.adapter()
    with pytest.raises(AttachError, match="detached already"):
        attachment.detach()


def test_attaching_does_not_share_memory_with_the_value():
    net = toys.Mlp()
    adapter = toys.random_adapter(net)
    kept = adapter["fc1"].dense().clone()
    with attach(net, adapter, trainable=True) as attachment:
        for p in attachment.parameters():
            p.data.add_(1.0)
    assert torch.equal(adapter["fc1"].dense(), kept)


def test_attach_and_adapter_round_trip():
    net = toys.Mlp()
    adapter = toys.random_adapter(net)
    with attach(net, adapter) as attachment:
        again = attachment.adapter()
    assert list(again) == list(adapter)
    assert again.card is adapter.card
    for path in adapter:
        assert torch.equal(again[path].U, adapter[path].U)
        assert torch.equal(again[path].V, adapter[path].V)
        assert again[path].scale == adapter[path].scale


def test_changed_class_is_an_error_and_detach_is_all_or_nothing():
    class Other(nn.Linear):
        pass

    net = toys.Mlp()
    attachment = attach(net, toys.random_adapter(net))
    adapted = type(net.fc2)
    net.fc2.__class__ = Other
    with pytest.raises(AttachError, match="fc2"):
        attachment.detach()
    assert attachment.attached
    assert "lora_V" in net.fc1._parameters
    net.fc2.__class__ = adapted
    attachment.detach()
    assert type(net.fc1) is type(net.fc2) is nn.Linear


def test_leaving_the_with_block_detaches_also_after_an_error():
    net = toys.Mlp()
    before = toys.snapshot(net)
    with pytest.raises(ZeroDivisionError), attach(net, LoraConfig(rank=2), trainable=True):
        raise ZeroDivisionError
    assert toys.snapshot(net) == before


# What it refuses


@pytest.mark.parametrize("targets", [["fc1"], ["fc2"]])
def test_second_attachment_is_refused_with_alternatives(targets):
    net = toys.Mlp()
    with attach(net, LoraConfig(rank=2, targets=["fc1"])) as first:
        with pytest.raises(AttachError, match=r"detach it first.*sum.*bank"):
            attach(net, LoraConfig(rank=2, targets=targets))
        assert first.attached
        assert type(net.fc2) is nn.Linear


def test_module_with_instance_forward_is_refused():
    net = toys.Mlp()
    net.fc1.forward = net.fc1.forward
    with pytest.raises(AttachError, match=r"fc1 has its own forward attribute"):
        attach(net, LoraConfig(rank=2))
    assert type(net.fc1) is type(net.fc2) is nn.Linear


def test_multihead_attention_is_skipped_by_groups_and_refused_by_name():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with attach(layer, LoraConfig(rank=2)) as attachment:
        assert attachment.sites == ("linear1", "linear2")
        assert "self_attn.out_proj" in attachment.plan.skipped
    with pytest.raises(TargetError, match="MultiheadAttention"):
        attach(layer, LoraConfig(rank=2, targets=["out_proj"]))
    update = LowRank(torch.zeros(8, 1), torch.zeros(1, 8))
    with pytest.raises(ShapeError, match="MultiheadAttention"):
        attach(layer, Adapter({"self_attn.out_proj": update}))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_the_fast_path_of_transformer_encoders_does_not_bypass_the_adapter(whole):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2) if whole else layer
    net.eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    adapter = toys.random_adapter(net, size=1.0)
    before = toys.snapshot(net)
    fast = net(x)
    with attach(net, adapter):
        slow = net(x.requires_grad_(True)).detach()
        with torch.no_grad():
            assert relative(net(x), slow) < FLOAT32
            assert relative(net(x), fast) > 0.01
            padded = net(x, src_key_padding_mask=padding)
        kept = net(x, src_key_padding_mask=padding).detach()
        assert relative(padded[~padding], kept[~padding]) < FLOAT32
    assert toys.snapshot(net) == before


def test_subclasses_of_linear_keep_their_own_forward():
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 2

    net = nn.Sequential(Squared(6, 4)).double()
    adapter = toys.random_adapter(net, LoraConfig(rank=2, targets=["0"])).to(torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = net(x) + adapter["0"].apply(x)
    with attach(net, adapter):
        assert relative(net(x), expected) < EXACT


def test_a_layer_without_weights_yet_is_refused():
    net = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(TargetError, match="first batch"):
        attach(net, LoraConfig(rank=2, targets=["0"]))


def test_parametrised_weights_are_adapted():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))).double()
    adapter = toys.random_adapter(net, LoraConfig(rank=2, targets=["0"])).to(torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = net(x) + adapter["0"].apply(x)
    with attach(net, adapter):
        assert relative(net(x), expected) < EXACT
    assert relative(net(x) + adapter["0"].apply(x), expected) < EXACT


def test_missing_sites_and_wrong_shapes_are_listed_together():
    net = toys.Mlp()
    wrong = Adapter(
        {
            "fc1": LowRank(torch.zeros(5, 1), torch.zeros(1, 10)),
            "fc_2": LowRank(torch.zeros(10, 1), torch.zeros(1, 4)),
        }
    )
    with pytest.raises(ShapeError, match=r"(?s)2 of 2 sites.*\(6, 10\).*\(5, 10\).*fc_2.*did you mean 'fc2'"):
        attach(net, wrong)


def test_wrong_argument_type_is_named():
    with pytest.raises(AttachError, match="got dict"):
        attach(toys.Mlp(), {})  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="got str"):
        attach("gpt2", LoraConfig())


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_invalid_dropout_is_refused(dropout):
    net = toys.Mlp()
    with pytest.raises(ConfigError, match="dropout"):
        attach(net, toys.random_adapter(net), dropout=dropout)


def test_pickling_and_saving_an_attached_model_is_refused(llama, tmp_path):
    with attach(llama, LoraConfig(rank=2)):
        with pytest.raises(AttachError, match=r"brushstroke\.save"):
            pickle.dumps(llama)
        with pytest.raises(AttachError, match=r"brushstroke\.save"):
            torch.save(llama, io.BytesIO())
        for model in (llama, llama.model):
            with pytest.raises(AttachError, match=r"save the adapter with brushstroke\.save"):
                model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        keys = set(llama.state_dict())
    assert set(llama.state_dict()) == {key for key in keys if "lora_" not in key}
    llama.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_custom_save_pretrained_is_kept(llama):
    llama.save_pretrained = own = lambda *args: "mine"
    attach(llama, LoraConfig(rank=2)).detach()
    assert llama.save_pretrained is own


def test_a_deep_copy_works_and_is_independent():
    net = toys.Mlp()
    x = torch.randn(5, 6)
    with attach(net, toys.random_adapter(net)) as attachment:
        twin = copy.deepcopy(net)
        adapted = net(x)
        assert torch.equal(twin(x), adapted)
        with attachment.disabled():
            assert torch.equal(twin(x), adapted)
        net.fc1.lora_V.data.zero_()
        assert torch.equal(twin(x), adapted)


def test_plan_and_card_describe_the_attachment(llama):
    with attach(llama, LoraConfig(rank=4, targets=["q_proj", "down_proj"])) as attachment:
        assert attachment.plan.matches["q_proj"] == (
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
        )
        assert len(attachment.sites) == 4
        card = attachment.adapter().card
    assert card.target_modules == ("down_proj", "q_proj")
    assert card.lora["rank"] == 4
    assert set(card.fingerprint.samples) == set(attachment.plan.ranks)
    assert not card.conv1d


def test_same_seed_gives_the_same_initial_factors():
    first, second, other = (attach(toys.Mlp(), LoraConfig(rank=2), seed=s).adapter() for s in (3, 3, 4))
    assert torch.equal(first["fc1"].U, second["fc1"].U)
    assert not torch.equal(first["fc1"].U, other["fc1"].U)
    assert not first["fc1"].V.any()


def test_a_base_that_is_not_frozen_keeps_its_gradients():
    net = toys.Mlp()
    with attach(net, toys.random_adapter(net, LoraConfig(rank=2))):
        net(torch.randn(3, 6)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_continued_adapter_gets_the_fingerprint_of_this_base(llama):
    stranger = Adapter(dict(toys.random_adapter(llama).items()))
    assert stranger.card is None
    with attach(llama, stranger, trainable=True) as attachment:
        card = attachment.adapter().card
    assert set(card.fingerprint.samples) == set(stranger)
    assert card.target_modules
    other = copy.deepcopy(llama)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    made = Adapter(dict(stranger.items()), card)
    with pytest.raises(BaseMismatchError):
        attach(other, made)
    with attach(other, made, trainable=True, allow_different_base=True) as attachment:
        assert attachment.adapter().card.fingerprint != card.fingerprint


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 2)
        self.table = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.block = nn.ModuleDict({"fc": nn.Linear(4, 4)})
        self.experts = nn.Parameter(torch.zeros(2, 4, 4))


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("tower.conv1", "a Conv2d, which cannot be adapted yet"),
        ("tower.norm", "a LayerNorm, which cannot be adapted yet"),
        ("tower.experts", "a bare 3-D parameter, which cannot be adapted yet"),
        ("tower.block", r"a ModuleDict that holds other layers: name those \(fc\)"),
    ],
)
def test_error_names_the_kind_of_unsupported_modules(path, what):
    net = nn.ModuleDict({"tower": Vision()})
    name = path.rpartition(".")[2]
    for target in (path, name, f"(?:{name}|nothing)"):
        with pytest.raises(TargetError, match=rf"matches no site: {path} is {what}"):
            attach(net, LoraConfig(rank=1, targets=target))
    update = LowRank(torch.zeros(4, 1), torch.zeros(1, 4))
    with pytest.raises(ShapeError, match=rf"{path}: in the base it is {what}"):
        attach(net, Adapter({path: update, "tower.block.fc": update}))
