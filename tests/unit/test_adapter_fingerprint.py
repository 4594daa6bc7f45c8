"""Comparison of an adapter's fingerprint with a base: same, merged, quantised, foreign."""

import json

import pytest
import torch
from torch import nn

import toys
from brushstroke.adapter import Adapter, Card, Fingerprint, LoraConfig, Verdict
from brushstroke.adapter.fingerprint import SAMPLES, sample, sample_positions
from brushstroke.errors import AdapterFileError, BaseMismatchError
from brushstroke.layers import attach
from brushstroke.lowrank import LowRank
from brushstroke.merging import Rounding, merge, merge_weight
from brushstroke.sites import QuantisedBaseWarning

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]


def weights(seed: int = 0, sites: int = 3, size: float = 0.05) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): size * torch.randn(96, 64, generator=generator) for i in range(sites)}


def update(seed: int = 0, size: float = 0.05, rank: int = 4) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    U, V = torch.randn(96, rank, generator=generator), torch.randn(rank, 64, generator=generator)
    return LowRank(U, V, size / rank**0.5)


def judge(fingerprint, now, delta=None, quantised=False):
    deltas = delta or {path: update(seed=i) for i, path in enumerate(now)}
    return fingerprint.compare(now, lambda path, i, j: deltas[path].dense()[i, j], quantised)[0]


def to(base, dtype):
    return {path: W.to(dtype) for path, W in base.items()}


def merged(base, deltas, dtype=None):
    return {path: (W.float() + deltas[path].dense()).to(dtype or W.dtype) for path, W in base.items()}


@pytest.mark.parametrize("then", FLOATS)
@pytest.mark.parametrize("now", FLOATS)
@pytest.mark.parametrize("size", [1e-6, 0.05, 3.0])
def test_same_base_in_another_dtype_matches(then, now, size):
    base = weights(size=size)
    assert judge(Fingerprint.of(to(base, then)), to(base, now)) is Verdict.SAME


@pytest.mark.parametrize("then", HALVES)
@pytest.mark.parametrize("now", FLOATS)
def test_base_published_in_half_precision_matches(then, now):
    base = to(weights(), then)
    assert judge(Fingerprint.of(base), to(base, now)) is Verdict.SAME


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS])
def test_another_base_is_foreign(dtype, quantised):
    fingerprint = Fingerprint.of(weights(0))
    assert judge(fingerprint, to(weights(1), dtype), quantised=quantised) is Verdict.FOREIGN


def test_one_changed_site_of_many_is_foreign():
    """A base that was fine-tuned in one layer alone."""
    base = weights(sites=8)
    other = dict(base) | {"5": base["5"] + 0.01 * torch.randn(96, 64)}
    assert judge(Fingerprint.of(base), other) is Verdict.FOREIGN


@pytest.mark.parametrize("then", FLOATS)
@pytest.mark.parametrize("now", [torch.float64, *FLOATS])
@pytest.mark.parametrize("size", [0.1, 0.01, 0.001])
def test_a_merged_adapter_is_recognised(then, now, size):
    base = to(weights(), then)
    deltas = {path: update(seed=int(path), size=size) for path in base}
    assert judge(Fingerprint.of(base), merged(base, deltas, now), deltas) is Verdict.MERGED


@pytest.mark.parametrize("now", [torch.float32, *HALVES])
@pytest.mark.parametrize("size", [3e-5, 3e-6])
def test_small_merged_update_is_not_taken_for_the_base(now, size):
    """A few steps of training: entries a thousand times smaller than the weights'."""
    base = weights(sites=30)
    deltas = {path: update(seed=int(path), size=size) for path in base}
    done = merged(base, deltas, now)
    shows = any(not torch.equal(sample(done[p]), sample(base[p].to(now))) for p in base)
    verdict = judge(Fingerprint.of(to(base, now)), done, deltas)
    if shows and (now != torch.float16 or size > 1e-5):
        assert verdict in (Verdict.MERGED, Verdict.FOREIGN)


SMALL = [
    (then, now, size)
    for then in FLOATS
    for now in HALVES
    for size in (0.01, 0.001, 1e-4, 3e-5, 1e-5)
    # One step of bf16 is within the rounding of a base that was stored in fp16.
    if (then, now) != (torch.float16, torch.bfloat16) or size >= 0.001
]


@pytest.mark.parametrize(("then", "now", "size"), SMALL)
def test_a_stochastic_merge_is_recognised(then, now, size):
    base = to(weights(sites=100), then)
    deltas = {path: update(seed=int(path), size=size) for path in base}
    stochastic = Rounding("stochastic", seed=5)
    done = {p: merge_weight(W.to(now), deltas[p], p, stochastic, p)[0] for p, W in base.items()}
    assert judge(Fingerprint.of(base), done, deltas) is Verdict.MERGED


@pytest.mark.parametrize("dtype", FLOATS)
def test_adapter_merged_twice_is_refused(dtype):
    base = to(weights(), dtype)
    deltas = {path: update(seed=int(path)) for path in base}
    twice = merged(merged(base, deltas), deltas)
    assert judge(Fingerprint.of(base), twice, deltas) in (Verdict.MERGED, Verdict.FOREIGN)


def int8(W):
    scale = W.abs().amax(0, keepdim=True) / 127
    return (W / scale).round() * scale


def int4(W):
    blocks = W.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).reshape(W.shape)


@pytest.mark.parametrize("quantise", [int8, int4])
@pytest.mark.parametrize("direction", ["trained on it", "used on it"])
def test_quantised_base_must_be_marked(quantise, direction):
    base = weights()
    coarse = {path: quantise(W) for path, W in base.items()}
    if direction == "used on it":
        assert judge(Fingerprint.of(base), coarse) is Verdict.FOREIGN
        assert judge(Fingerprint.of(base), coarse, quantised=True) is Verdict.QUANTISED
    else:
        assert judge(Fingerprint.of(coarse), base) is Verdict.FOREIGN
        assert judge(Fingerprint.of(coarse, quantised=True), base) is Verdict.QUANTISED


def test_a_quantised_base_that_differs_by_more_is_foreign():
    base = weights()
    noisy = {path: W + 0.2 * 0.05 * torch.randn(96, 64) for path, W in base.items()}
    assert judge(Fingerprint.of(base), noisy, quantised=True) is Verdict.FOREIGN


@pytest.mark.parametrize("quantise", [int8, int4])
@pytest.mark.parametrize("size", [0.02, 0.005])
def test_merged_and_quantised_afterwards_is_recognised(quantise, size):
    base = weights()
    deltas = {path: update(seed=int(path), size=size) for path in base}
    coarse = {path: quantise(W) for path, W in merged(base, deltas).items()}
    assert judge(Fingerprint.of(base), coarse, deltas, quantised=True) is not Verdict.SAME
    assert judge(Fingerprint.of(base), coarse, deltas, quantised=True) is not Verdict.QUANTISED


def test_a_site_of_another_shape_is_foreign():
    base = weights()
    wide = {path: torch.cat([W, W]) for path, W in base.items()}
    assert judge(Fingerprint.of(base), wide) is Verdict.FOREIGN


def test_an_adapter_that_changes_nothing_finds_its_base():
    base = weights()
    zero = {path: 0.0 * update() for path in base}
    assert judge(Fingerprint.of(base), base, zero) is Verdict.SAME


@pytest.mark.parametrize(("d", "h"), [(1, 1), (3, 4), (16, 16), (17, 16), (2048, 2048), (4096, 512)])
def test_positions_are_distinct_and_spread(d, h):
    i, j = sample_positions(d, h)
    assert len(i) == min(SAMPLES, d * h)
    assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == len(i)
    assert i.max() < d
    assert j.max() < h
    if min(d, h) >= 512:
        assert len(set(i.tolist())) > 150
        assert len(set(j.tolist())) > 150


def test_json_round_trip():
    fingerprint = Fingerprint.of(to(weights(), torch.float16) | {"small": torch.randn(3, 4)}, quantised=True)
    again = Fingerprint.from_dict(json.loads(json.dumps(fingerprint.as_dict())))
    assert again.shapes == fingerprint.shapes
    assert again.quantised
    assert all(torch.equal(again.samples[p], fingerprint.samples[p]) for p in fingerprint.samples)
    assert again.as_dict() == fingerprint.as_dict()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("sites"),
        lambda d: d.pop("quantised"),
        lambda d: d["sites"]["0"].pop("shape"),
        lambda d: d["sites"]["0"].update(bf16="@@@"),
        lambda d: d["sites"]["0"].update(bf16=d["sites"]["0"]["bf16"][:8]),
        lambda d: d["sites"]["0"].update(shape=[96]),
        lambda d: d.update(sites=[1]),
    ],
)
def test_a_damaged_form_is_an_error(damage):
    stored = Fingerprint.of(weights()).as_dict()
    damage(stored)
    with pytest.raises(AdapterFileError, match="fingerprint"):
        Fingerprint.from_dict(stored)


# Through the public surface


def test_attach_compares_fingerprints(llama):
    adapter = toys.random_adapter(llama)
    attach(llama, adapter).detach()
    with pytest.raises(BaseMismatchError, match=r"another base.*--allow-different-base"):
        attach(toys.tiny_llama(seed=1), adapter)
    attach(toys.tiny_llama(seed=1), adapter, allow_different_base=True).detach()
    with pytest.raises(BaseMismatchError, match="already merged into the base"):
        attach(merge(llama, adapter), adapter)


@pytest.mark.parametrize("dtype", HALVES)
def test_an_adapter_trained_in_float32_attaches_in_half_precision_and_back(dtype):
    attach(toys.tiny_llama(dtype=dtype), toys.random_adapter(toys.tiny_llama())).detach()
    attach(toys.tiny_llama(), toys.random_adapter(toys.tiny_llama(dtype=dtype))).detach()


def test_quantised_base_warns_once(llama):
    adapter = toys.random_adapter(llama)
    with torch.no_grad():
        for module in llama.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(int8(module.weight.mT).mT)
    with pytest.raises(BaseMismatchError):
        attach(llama, adapter)
    llama.brushstroke_quantised = True
    with pytest.warns(QuantisedBaseWarning, match="quantised") as said:
        attach(llama, adapter).detach()
    assert len(said) == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_a_few_steps_of_training_are_recognised_after_a_merge(llama, steps):
    tokens = torch.randint(0, toys.VOCABULARY, (2, 12))
    with attach(llama, LoraConfig(rank=4), trainable=True) as attachment:
        optimiser = torch.optim.AdamW(attachment.parameters(), lr=1e-3)
        for _ in range(steps):
            optimiser.zero_grad()
            llama(tokens, labels=tokens).loss.backward()
            optimiser.step()
        adapter = attachment.adapter()
    with pytest.raises(BaseMismatchError):
        attach(merge(llama, adapter), adapter)
    attach(llama, adapter).detach()


def test_card_without_fingerprint_skips_the_check():
    net = toys.Mlp()
    adapter = toys.random_adapter(net)
    attach(toys.Mlp(), adapter.with_card(Card())).detach()
    attach(toys.Mlp(), Adapter(dict(adapter))).detach()
