"""Singular directions of base weights, and their cache."""

import os
from pathlib import Path

import pytest
import torch

import brushstroke as bs
from brushstroke.analysis import DirectionCache, intruders, relate
from brushstroke.analysis.directions import Working, base_directions
from brushstroke.errors import BaseLoadError
from brushstroke.lowrank import LowRank

SIDES = (320, 260)  # large enough to be kept


def spiked(d: int, h: int) -> torch.Tensor:
    k = min(d, h) // 2
    left, right = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q for n in (d, h))
    bulk = torch.randn(d, h, dtype=torch.float64) / (d + h) ** 0.5
    return (left * (20 * torch.arange(1, k + 1).double() ** -0.7)) @ right.mT + bulk


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    """Two weights, one as torch holds it and one as HF's Conv1D does."""
    return {"q": spiked(*SIDES).bfloat16().mT.contiguous().mT, "v": spiked(*SIDES).bfloat16()}


@pytest.fixture
def adapter() -> bs.Adapter:
    d, h = SIDES
    sites = ("q", "v")
    return bs.Adapter(
        {site: LowRank(torch.randn(d, 4) / d**0.5, torch.randn(4, h) / h**0.5, 15.0) for site in sites}
    )


@pytest.mark.parametrize("flags", [{}, {"dense_limit": 100}])
def test_results_from_the_cache_are_those_without_it(base, adapter, tmp_path, flags):
    first, second = DirectionCache(tmp_path), DirectionCache(tmp_path)
    plain = [relate(adapter, base, **flags).as_dict(), intruders(adapter, base, **flags).as_dict()]
    made = [
        relate(adapter, base, cache=first, **flags).as_dict(),
        intruders(adapter, base, cache=first, **flags).as_dict(),
    ]
    found = [
        relate(adapter, base, cache=second, **flags).as_dict(),
        intruders(adapter, base, cache=second, **flags).as_dict(),
    ]
    assert plain == made == found
    assert (first.used, first.kept) == (2, 2)  # the second question takes what the first one kept
    assert (second.used, second.kept) == (4, 0)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_floor_of_a_weight_with_more_outputs_is_kept_too(tmp_path):
    W, caches = torch.randn(200, 400), [DirectionCache(tmp_path) for _ in range(2)]
    new = bs.Adapter({"q": LowRank(torch.randn(200, 2), torch.randn(2, 400))})
    plain = intruders(new, {"q": W}, dense_limit=0)
    assert plain.count() == 2
    for cache, used, kept in ((caches[0], 0, 2), (caches[1], 1, 0)):
        assert intruders(new, {"q": W}, dense_limit=0, cache=cache).as_dict() == plain.as_dict()
        assert (cache.used, cache.kept) == (used, kept)


def test_cache_key_depends_on_seed_and_base_not_on_adapter(base, adapter, tmp_path):
    flags = {"dense_limit": 0}
    relate(adapter, base, cache=DirectionCache(tmp_path), **flags)
    other = DirectionCache(tmp_path)
    relate(0.5 * adapter, base, cache=other, **flags)
    assert (other.used, other.kept) == (2, 0)
    for changed in (
        {"seed": 1, "dense_limit": 0},
        {"dense_limit": 10_000},
    ):
        asked = DirectionCache(tmp_path)
        relate(adapter, base, cache=asked, **changed)
        assert (asked.used, asked.kept) == (0, 2)
    base["q"][3, 4] += 0.125
    once = DirectionCache(tmp_path)
    relate(adapter, base, cache=once, **flags)
    assert (once.used, once.kept) == (1, 1)


def test_weight_and_transpose_have_separate_cache_files(tmp_path):
    W, cache = torch.randn(300, 300), DirectionCache(tmp_path)
    one = base_directions("q", W, 4, whole=True, cache=cache)
    two = base_directions("q", W.mT, 4, whole=True, cache=cache)
    assert cache.kept == 2
    torch.testing.assert_close(one.left.abs(), two.right.mT.abs(), rtol=0, atol=1e-8)


def damage(file: Path, how: str, other: Path) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "cut": content[:middle],
            "empty": b"",
            "one byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "zeros": bytes(len(content)),
            "another weight's": other.read_bytes(),
            "text": b"no directions",
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "empty", "one byte", "zeros", "another weight's", "text"])
def test_wrong_or_damaged_cache_file_is_recomputed(base, adapter, tmp_path, how):
    plain = relate(adapter, base).as_dict()
    relate(adapter, base, cache=DirectionCache(tmp_path))
    first, second = sorted(tmp_path.iterdir())
    whole = first.read_bytes()
    damage(first, how, second)
    again = DirectionCache(tmp_path)
    assert relate(adapter, base, cache=again).as_dict() == plain
    assert (again.used, again.kept) == (1, 1)
    assert first.read_bytes() == whole


def test_the_cache_is_of_bounded_size(adapter, tmp_path):
    weights = [torch.randn(300, 280) for _ in range(4)]
    cache = DirectionCache(tmp_path)
    base_directions("q", weights[0], 4, whole=False, cache=cache)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    base_directions("q", weights[1], 4, whole=False, cache=cache)
    for age, file in enumerate(sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)):
        os.utime(file, (1000 + age, 1000 + age))
    small = DirectionCache(tmp_path, limit=2 * size + size // 2)
    base_directions("q", weights[0], 4, whole=False, cache=small)  # the oldest, and used again
    base_directions("q", weights[2], 4, whole=False, cache=small)
    assert (small.used, small.kept) == (1, 1)
    base_directions("q", weights[3], 4, whole=False, cache=small)  # all others are of this run
    assert small.kept == 1
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= small.limit
    left = DirectionCache(tmp_path)
    for number, expected in enumerate([True, False, True, False]):
        before = left.used
        base_directions("q", weights[number], 4, whole=False, cache=left)
        assert (left.used > before) == expected


def test_small_weights_are_not_cached(tmp_path):
    cache = DirectionCache(tmp_path / "none")
    base_directions("q", torch.randn(100, 100), 4, whole=True, cache=cache)
    assert not (tmp_path / "none").exists()


def test_unwritable_cache_does_not_change_results(base, adapter, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DirectionCache(tmp_path / "file" / "directions")
    assert relate(adapter, base, cache=cache).as_dict() == relate(adapter, base).as_dict()
    assert cache.kept == 0
    assert cache.failure


def test_cache_folder_is_the_library_default(monkeypatch, tmp_path):
    monkeypatch.setenv("BRUSHSTROKE_CACHE", str(tmp_path))
    assert DirectionCache().folder == tmp_path / "directions"


def test_non_finite_results_are_not_cached(tmp_path):
    W = torch.randn(300, 300)
    W[1, 2] = torch.nan
    with pytest.raises(BaseLoadError, match="q: the base's weight contains NaN"):
        base_directions("q", W, 4, whole=False, cache=DirectionCache(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_multiplied_in_float32_or_float64(dtype):
    working = Working()
    for W in (torch.randn(5, 7).to(dtype), torch.randn(7, 5).to(dtype).mT, torch.randn(3, 2).to(dtype)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(working(W, whole=False), W.to(wide))
        assert torch.equal(working(W, whole=True), W.double())
