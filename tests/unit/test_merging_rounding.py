"""Rounding of W + ΔW: unbiased, one of two neighbours, and the same bits for a seed, name and position."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.errors import ConfigError
from brushstroke.layers import attach
from brushstroke.layers.embedding import EmbeddingLowRank
from brushstroke.lowrank import LowRank
from brushstroke.merging import MergeReport, merge, merge_weight
from brushstroke.merging.rounding import KEPT, Rounding, round_stochastically

HALVES = [torch.bfloat16, torch.float16]
STOCHASTIC = Rounding("stochastic")


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(total: torch.Tensor, dtype: torch.dtype, seed: int = 0, name: str = "w", column: int = 0):
    return round_stochastically(total, dtype, seed, name, column)


def neighbours(total: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of a dtype that is not above a float32, and the smallest that is not below it."""
    nearest = total.to(dtype)
    size = nearest.abs().view(torch.int16)
    grown, shrunk = (size + 1).view(dtype), (size - 1).clamp_min(0).view(dtype)
    tiny = torch.ones((), dtype=torch.int16).view(dtype)
    up = torch.where(nearest == 0, tiny, torch.where(nearest > 0, grown, -shrunk))
    down = torch.where(nearest == 0, -tiny, torch.where(nearest > 0, shrunk, -grown))
    lower = torch.where(nearest.float() <= total, nearest, down)
    upper = torch.where(nearest.float() >= total, nearest, up)
    return lower, upper


def update_of(d: int, h: int, size: float, rank: int = 4) -> LowRank:
    return LowRank(torch.randn(d, rank), size * torch.randn(rank, h), 1.0 / rank**0.5)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(HALVES),
    st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
)
def test_each_sum_becomes_one_of_its_two_neighbours(dtype, numbers, seed, column):
    total = torch.tensor(numbers)[:, None]
    lower, upper = neighbours(total, dtype)
    found = rounded(total, dtype, seed, "w", column)
    assert bool(((found == lower) | (found == upper)).all())
    assert bool((found.float() == total)[lower == upper].all())


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.sampled_from(HALVES),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1e-6, 1e-4, 1e-2, 1.0]),
    st.integers(0, 2**31),
)
def test_each_merged_entry_is_one_of_the_two_neighbours_of_the_sum(dtype, d, h, size, seed):
    torch.manual_seed(seed)
    W, update = torch.randn(d, h).to(dtype), update_of(d, h, size)
    total = W.float() + update.dense()
    lower, upper = neighbours(total, dtype)
    M, drift = merge_weight(W, update, "w", STOCHASTIC, f"{seed}")
    assert drift.stochastic
    assert bool(((lower == M) | (upper == M)).all())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, -0.03, 3e-6, 1e-7, -3e-8])  # the last ones are subnormal in fp16
def test_it_is_right_on_average(dtype, size):
    total = torch.full((1000, 400), size * 1.23456789)
    lower, upper = (edge.double()[0, 0] for edge in neighbours(total, dtype))
    step = float(upper - lower)
    error = float(rounded(total, dtype).double().mean() - total.double()[0, 0]) / step
    assert abs(error) < 4 * 0.5 / total.numel() ** 0.5 + 2.0**-16
    assert rounded(total, dtype).unique().numel() == 2


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_of_the_dtype_stay(dtype):
    total = torch.randn(200, 30).to(dtype).float()
    total[0] = 0.0
    assert torch.equal(rounded(total, dtype).float(), total)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_same_seed_name_and_position_give_the_same_bits(dtype):
    total = torch.randn(37, 50)
    whole = rounded(total, dtype)
    for start, stop in ((0, 7), (7, 8), (8, 50)):
        part = rounded(total[:, start:stop], dtype, column=start)
        assert torch.equal(part, whole[:, start:stop])
    assert torch.equal(rounded(total.mT.contiguous().mT, dtype), whole)
    assert not torch.equal(rounded(total, dtype, seed=1), whole)
    assert not torch.equal(rounded(total, dtype, name="v"), whole)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", ["columns", "rows"])
def test_a_merge_has_the_same_bits_and_decision_for_any_number_of_threads(dtype, stored):
    W = torch.randn(300, 700).to(dtype) if stored == "rows" else torch.randn(700, 300).to(dtype).mT
    update, found = update_of(300, 700, 1e-3 if dtype == torch.bfloat16 else 1e-4), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(merge_weight(W, update, "w"))
    assert all(torch.equal(M, found[0][0]) for M, _ in found)
    assert len({(drift.survived, drift.error) for _, drift in found}) == 1
    assert found[0][1].stochastic


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_keeps_what_nearest_loses(dtype):
    W = (0.1 * torch.randn(500, 400)).to(dtype)
    update = update_of(500, 400, 1e-4 if dtype == torch.bfloat16 else 3e-5)
    nearest = merge_weight(W, update, "w", Rounding("nearest"))[1]
    auto = merge_weight(W, update, "w")[1]
    assert nearest.survived < 0.9
    assert not nearest.stochastic
    assert auto.stochastic
    assert auto.survived == pytest.approx(1.0, abs=0.03)


def test_auto_decides_for_each_site():
    net = toys.Mlp(64, 96, 48).bfloat16()
    sizes = iter((1.0, 1e-3, 1e-3))
    adapter = toys.random_adapter(net)
    mixed = Adapter({path: next(sizes) * update for path, update in adapter.items()})
    report: list[MergeReport] = []
    auto = merge(net, mixed, report=report)
    nearest_of, stochastic_of = (merge(net, mixed, rounding=mode) for mode in ("nearest", "stochastic"))
    assert 0 < report[0].stochastic < len(mixed)
    for path, drift in report[0].sites.items():
        twin = stochastic_of if drift.stochastic else nearest_of
        assert torch.equal(auto.get_submodule(path).weight, twin.get_submodule(path).weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_full_size_updates_are_merged_as_with_nearest(dtype):
    net = toys.Mlp(64, 96, 48).to(dtype)
    adapter = toys.random_adapter(net)
    report: list[MergeReport] = []
    auto, nearest = merge(net, adapter, report=report), merge(net, adapter, rounding="nearest")
    assert report[0].survived > KEPT
    for p, q in zip(auto.parameters(), nearest.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_are_rounded_to_nearest(dtype):
    net = toys.Mlp().to(dtype)
    adapter = toys.random_adapter(net)
    report: list[MergeReport] = []
    merged = merge(net, adapter, rounding="stochastic", rounding_seed=3, report=report)
    assert report[0].stochastic == 0
    for p, q in zip(merged.parameters(), merge(net, adapter).parameters(), strict=True):
        assert torch.equal(p, q)


def small(adapter: Adapter, factor: float = 1e-3) -> Adapter:
    return Adapter({path: factor * update for path, update in adapter.items()}, adapter.card)


@pytest.mark.parametrize("kind", ["Conv1D", "tied head", "shared weight", "embedding", "DoRA"])
def test_every_kind_of_site_is_rounded_stochastically(kind, gpt2, tied_llama):
    if kind == "DoRA":
        net = toys.Mlp(64, 96, 48)
        with attach(net, LoraConfig(rank=2, variant="dora")) as attachment:
            with torch.no_grad():
                for parameter in attachment.parameters():
                    parameter += 1e-4 * torch.randn_like(parameter)
            adapter = attachment.adapter().with_card(None)
    elif kind == "shared weight":
        net = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(2)))
        net[1].weight = net[0].weight
        adapter = small(toys.random_adapter(net, LoraConfig(rank=2, targets=["0", "1"])))
    elif kind == "embedding":
        net = torch.nn.Sequential(torch.nn.Embedding(90, 64))
        adapter = Adapter({"0": EmbeddingLowRank(torch.randn(90, 2), 1e-3 * torch.randn(2, 64))})
    else:
        net = gpt2 if kind == "Conv1D" else tied_llama
        targets = "all-linear" if kind == "Conv1D" else ["lm_head"]
        adapter = small(toys.random_adapter(net, LoraConfig(rank=2, targets=targets)))
    net = net.bfloat16()
    report: list[MergeReport] = []
    merged = merge(net, adapter.with_card(None), report=report)
    assert report[0].stochastic == len(adapter)
    assert all(drift.survived == pytest.approx(1.0, abs=0.35) for drift in report[0].sites.values())
    again = merge(net, adapter.with_card(None))
    for p, q in zip(merged.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    changed = merge(net, adapter.with_card(None), rounding_seed=1)
    path = next(iter(adapter))
    assert not torch.equal(changed.get_submodule(path).weight, merged.get_submodule(path).weight)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rounding": "up"}, "rounding must be one of auto, nearest, stochastic; got 'up'"),
        ({"rounding_seed": -1}, "the seed of the rounding must be a whole number from 0 to"),
        ({"rounding_seed": 2**63}, "the seed of the rounding must be a whole number from 0 to"),
        ({"rounding_seed": 1.5}, "the seed of the rounding must be a whole number from 0 to"),
        ({"rounding_seed": True}, "the seed of the rounding must be a whole number from 0 to"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_invalid_roundings_are_refused(given, said):
    net = toys.Mlp()
    with pytest.raises(ConfigError, match=said):
        merge(net, toys.random_adapter(net), **given)
