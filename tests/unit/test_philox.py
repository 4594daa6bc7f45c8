"""The order of the data, dropout and rounding come from a stated generator, whatever Python or numpy do."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from brushstroke.philox import DROPOUT, ORDER, ROUNDING, dropout_seed, order_of, rounding_bits
from brushstroke.training.sampler import BatchSampler
from training_kit import examples

MASK = 2**64 - 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """One block of Philox4x64-10 as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ k0, second & MASK, (first >> 64) ^ d ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [a, b, c, d]


def draws(count: int, key: tuple[int, int], high: tuple[int, int]) -> list[int]:
    blocks = (philox(key, (block, 0, *high)) for block in itertools.count(1))
    return list(itertools.islice(itertools.chain.from_iterable(blocks), count))


def test_the_reference_gives_the_published_vector() -> None:
    """The first of the known answers that come with Random123."""
    assert philox((0, 0), (0, 0, 0, 0))[:2] == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**63 - 1, 10**6)])
def test_an_epoch_is_in_the_order_of_its_random_numbers(seed: int, epoch: int) -> None:
    numbers = draws(101, (seed, epoch), (0, ORDER))
    assert order_of(101, seed, epoch) == sorted(range(101), key=numbers.__getitem__)


@pytest.mark.parametrize(("seed", "step", "call"), [(0, 0, 0), (3, 5, 2), (2**63 - 1, 2**53, 1)])
def test_the_seed_of_dropout_is_a_random_number_of_its_step_and_call(seed: int, step: int, call: int) -> None:
    found = dropout_seed(seed, step, call)
    assert found == draws(1, (seed, step), (call, DROPOUT))[0] >> 1
    torch.Generator().manual_seed(found)


def test_every_example_comes_once_an_epoch_and_any_step_can_be_asked_for() -> None:
    data = examples(10)
    batches = BatchSampler(data, 4, seed=2)
    epochs = [[e.row for step in range(3 * n, 3 * n + 3) for e in batches.batch(step)] for n in range(2)]
    assert [sorted(rows) for rows in epochs] == [list(range(1, 11))] * 2  # type: ignore[type-var]
    assert epochs[0] != epochs[1]
    assert BatchSampler(data, 4, seed=2).batch(5) == batches.batch(5)


def test_the_bits_of_a_position_are_those_of_its_block_in_whatever_range_it_is_drawn() -> None:
    key = (2**63 - 1, int.from_bytes(hashlib.blake2b(b"a.weight", digest_size=8).digest(), "little"))
    blocks = [philox(key, (block, 0, 0, ROUNDING)) for block in range(1, 5)]
    expected = [word >> shift & 0xFFFF for block in blocks for word in block for shift in (0, 16, 32, 48)]
    found = rounding_bits(2**63 - 1, "a.weight", 0, 64)
    assert found.dtype == np.uint16
    assert found.tolist() == expected
    for start, count in ((0, 1), (1, 3), (15, 2), (16, 16), (31, 33), (63, 1)):
        assert rounding_bits(2**63 - 1, "a.weight", start, count).tolist() == expected[start : start + count]
    for seed, name in ((2**63 - 2, "a.weight"), (2**63 - 1, "b.weight")):
        assert rounding_bits(seed, name, 0, 64).tolist() != expected
