"""Rows of several adapters and of the base in one packed pass: each gets what it gets alone."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from inference_kit import gpt2, llama
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.data import Example
from brushstroke.errors import RouteError
from brushstroke.layers import attach, bank, find_route
from brushstroke.packed.forward import PaddedForward, find_head
from brushstroke.packed.fused_modules import fuse
from brushstroke.packed.pack import Pass, Row, plan_passes, unshared
from brushstroke.packed.select import select_forward
from toys import random_adapter

EXACT = 1e-5  # fp32, of the largest logit
NAMES = ("one", "eight", "many")
MODELS = {  # model of two layers, sites of the three adapters, calls of the fused functions in a pass
    "llama": (
        lambda: llama(hidden_size=64, intermediate_size=96, num_key_value_heads=4),
        (
            ["q_proj", "v_proj"],
            ["k_proj", "o_proj", "gate_proj", "down_proj"],
            ["v_proj", "o_proj", "up_proj"],
        ),
        {"attention": 2, "mlp": 2, "linear": 2, "norm": 5},  # q, k and v at once, the block, o
    ),
    "gpt2": (
        lambda: gpt2(n_embd=64),
        (["c_attn"], ["c_attn", "c_fc", "mlp.c_proj"], ["attn.c_proj", "c_fc"]),
        {"mlp": 2, "linear": 4},  # the block, c_attn and c_proj
    ),
}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Adapter], dict[str, int]]:
    make, sites, calls = MODELS[request.param]
    model = make()
    configs = [LoraConfig(rank=rank, targets=own) for rank, own in zip((1, 8, 33), sites, strict=True)]
    adapters = {
        name: random_adapter(model, config, seed=i)
        for i, (name, config) in enumerate(zip(NAMES, configs, strict=True))
    }
    return model, adapters, calls


def rows_of(slots: dict[str | None, int]) -> list[tuple[str | None, Row]]:
    """Five rows, two of which share an adapter and a prefix, and of those that do not one has the same."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 264, (n,), generator=generator).tolist()  # noqa: E731
    prefix = draw(20)
    texts = {
        "one": [draw(11)],
        "eight": [prefix + draw(7), prefix + draw(12)],
        "many": [prefix + draw(30)],
        None: [draw(9)],
    }
    return [
        (name, Row(tuple(text), tuple(range(min(len(text) - 1, 21), len(text))), slot=slots[name]))
        for name, own in texts.items()
        for text in own
    ]


def alone(model: nn.Module, adapter: Adapter | None, row: Row) -> torch.Tensor:
    """The logits of one row by transformers, with its adapter attached to this model."""
    if adapter is not None:
        attach(model, adapter)
    return model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, list(row.wanted)]


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the fused functions are called from now on."""
    calls: Counter[str] = Counter()

    def watch(where: str, name: str) -> None:
        path, _, attribute = where.rpartition(".")
        function = getattr(__import__(path, fromlist=["_"]), attribute)

        def called(*args: object, **options: object) -> object:
            calls[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(where, called)

    watch("brushstroke.layers.linear.lowrank_linears", "linear")
    watch("brushstroke.packed.fused_modules.lowrank_linears", "attention")
    watch("brushstroke.packed.fused_modules.mlp", "mlp")
    watch("brushstroke.packed.fused_modules.rms_norm", "norm")
    return calls


@torch.no_grad()
@pytest.mark.parametrize("frozen", [True, False])
def test_a_packed_pass_of_five_rows_gives_each_what_it_gets_alone(kind, frozen, monkeypatch) -> None:
    model, adapters, expected_calls = kind
    model.requires_grad_(not frozen)
    untouched = copy.deepcopy(model)
    with bank(model, adapters) as loaded:
        slots = {name: loaded.slot(name) for name in (*NAMES, None)}
        rows = rows_of(slots)
        fusion = fuse(model)
        forward, reason = select_forward(model, share=True)
        assert forward.name == "packed", reason
        (packed,) = plan_passes([row for _, row in rows], 1024, share=True)
        assert [len(group.members) for group in packed.groups if group.prefix] == [2]
        calls = counted(monkeypatch)
        with forward.context():
            found = forward.logits(packed).split([len(row.wanted) for row in packed.rows])
            assert find_route(model).uniform is None
        assert loaded.active == (None,)
        assert calls == expected_calls
        fusion.remove()
    names = {row: name for name, row in rows}
    assert set(packed.rows) == set(names)
    for row, logits in zip(packed.rows, found, strict=True):
        expected = alone(copy.deepcopy(untouched), adapters.get(names[row]), row)
        assert (logits - expected).abs().max() <= EXACT * expected.abs().max()


@torch.no_grad()
def test_padded_batches_give_each_row_what_it_gets_alone(kind) -> None:
    model, adapters, _ = kind
    untouched = copy.deepcopy(model)
    with bank(model, adapters) as loaded:
        rows = rows_of({name: loaded.slot(name) for name in (*NAMES, None)})
        forward = PaddedForward(model, find_head(model), whole=False)
        (packed,) = forward.passes([row for _, row in rows], 1024, share=True)
        with forward.context():
            found = forward.logits(packed).split([len(row.wanted) for row in packed.rows])
        assert loaded.active == (None,)
    names = {row: name for name, row in rows}
    for row, logits in zip(packed.rows, found, strict=True):
        expected = alone(copy.deepcopy(untouched), adapters.get(names[row]), row)
        assert (logits - expected).abs().max() <= EXACT * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_only_the_tokens_of_an_adapter_pay_for_it_at_its_own_sites(kind, fused) -> None:
    model, adapters, _ = kind
    with bank(model, adapters) as loaded:
        rows = [row for _, row in rows_of({name: loaded.slot(name) for name in (*NAMES, None)})]
        fusion = fuse(model) if fused else None
        forward, _ = select_forward(model, share=True)

        def cost(packed: Pass) -> int:
            in_place = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
            with FlopCounterMode(display=False, custom_mapping=in_place) as counter, forward.context():
                forward.logits(packed)
            return counter.get_total_flops()

        of_base = cost(unshared([Row(row.tokens, row.wanted, slot=0) for row in rows]))
        extra = cost(unshared(rows)) - of_base
        if fusion is not None:
            fusion.remove()
        tokens = {name: sum(len(r) for r in rows if r.slot == loaded.slot(name)) for name in NAMES}
    assert extra == sum(
        2 * tokens[name] * update.rank * sum(update.shape)
        for name, adapter in adapters.items()
        for update in adapter.values()
    )


def test_a_cached_prefix_runs_with_the_slot_of_its_rows(kind) -> None:
    model, adapters, _ = kind
    prefix = tuple(range(3, 103))
    examples = [
        Example((*prefix, 110 + i, *range(120, 140 + i)), (0.0,) * 101 + (1.0,) * (20 + i)) for i in range(8)
    ]
    untouched = copy.deepcopy(model)
    with bank(model, adapters) as loaded, torch.no_grad():
        forward, _ = select_forward(model, share=True)
        rows = [Row.of(example, loaded.slot(name)) for name in ("many", None) for example in examples]
        passes = forward.passes(rows, 140, share=True)
        assert max(packed.groups[0].part or 0 for packed in passes) >= 1
        found = dict.fromkeys((loaded.slot("many"), 0), 0.0)
        with forward.context():
            for packed, outputs in forward.run(passes):
                found[packed.rows[0].slot] += outputs.summed_loss(None).item()
    expected = []
    for name in ("many", None):
        twins = [(copy.deepcopy(untouched), Row.of(example)) for example in examples]
        logits = [alone(twin, adapters.get(name), row) for twin, row in twins]
        targets = [torch.tensor(row.targets) for _, row in twins]
        losses = map(partial(F.cross_entropy, reduction="sum"), logits, targets)
        expected.append(sum(loss.item() for loss in losses))
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 5e-5 * expected[0]


def test_gradients_reach_the_embeddings_of_each_row(kind) -> None:
    model, adapters, _ = kind
    model.requires_grad_(False)
    table = model.get_input_embeddings().weight.requires_grad_(True)
    untouched = copy.deepcopy(model)
    with bank(model, adapters) as loaded:
        rows = rows_of({name: loaded.slot(name) for name in (*NAMES, None)})
        fusion = fuse(model)
        forward, _ = select_forward(model, share=True)
        (packed,) = forward.passes([row for _, row in rows], 1024, share=True)
        with forward.context():
            (gradient,) = torch.autograd.grad(forward.logits(packed).square().sum(), table)
        fusion.remove()
    total = torch.zeros_like(table)
    for name, row in rows:
        twin = copy.deepcopy(untouched)
        logits = alone(twin, adapters.get(name), row)
        total += torch.autograd.grad(logits.square().sum(), twin.get_input_embeddings().weight)[0]
    assert (gradient - total).norm() <= 1e-4 * total.norm()


def test_a_slot_without_a_bank_is_an_error() -> None:
    model = llama()
    forward, _ = select_forward(model, share=True)
    with forward.context(), pytest.raises(RouteError, match="the model has no bank"):
        forward.logits(unshared([Row((1, 2, 3), (2,), slot=1)]))
    with forward.context(), torch.no_grad():
        based, plain = (forward.logits(unshared([Row((1, 2, 3), (2,), slot=slot)])) for slot in (0, None))
    assert torch.equal(based, plain)


@pytest.mark.parametrize("padded", [False, True])
def test_adapted_heads_use_the_adapter_of_each_row(padded) -> None:
    model = llama(hidden_size=64, intermediate_size=96, num_key_value_heads=4)
    targets = (["lm_head", "q_proj"], ["lm_head"], ["v_proj"])
    adapters = {
        name: random_adapter(model, LoraConfig(rank=rank, targets=own), seed=rank)
        for name, rank, own in zip(NAMES, (1, 8, 33), targets, strict=True)
    }
    with bank(model, adapters) as loaded:
        named = rows_of({name: loaded.slot(name) for name in (*NAMES, None)})
        rows = [row for _, row in named]
        forward = (
            PaddedForward(model, find_head(model), whole=False) if padded else select_forward(model, True)[0]
        )
        with torch.no_grad(), forward.context():
            (packed,) = forward.passes(rows, 1000, share=True)
            found = dict(
                zip(
                    packed.rows,
                    forward.logits(packed).split([len(r.wanted) for r in packed.rows]),
                    strict=True,
                )
            )
    for name, row in named:
        with torch.no_grad():
            expected = alone(copy.deepcopy(model), adapters.get(name), row)
        assert (found[row] - expected).abs().max() <= EXACT * expected.abs().max()
