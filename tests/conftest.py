"""Fixtures for the whole suite; every test starts from a seed that is printed when it fails."""

import os
import random
import zlib
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from torch import nn

import toys
from sampling import SEED

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _seed_of(nodeid: str) -> int:
    return (zlib.crc32(nodeid.encode()) + SEED) % 2**31


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    seed = _seed_of(request.node.nodeid)
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        seed = f"BRUSHSTROKE_TEST_SEED={SEED} (this test: {_seed_of(item.nodeid)})"
        report.sections.append(("random seed", seed))
    return report


@pytest.fixture
def unchecked() -> Iterator[None]:
    """For tests that hand in wrong shapes on purpose: the library's own errors, not the shape checker's."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def llama() -> nn.Module:
    """A tiny random Llama with a head of its own."""
    return toys.tiny_llama()


@pytest.fixture
def tied_llama() -> nn.Module:
    """A tiny random Llama whose head is its input embedding."""
    return toys.tiny_llama(tied=True)


@pytest.fixture
def gpt2() -> nn.Module:
    """A tiny random GPT-2."""
    return toys.tiny_gpt2()


@pytest.fixture(params=["llama", "gpt2"])
def language_model(request: pytest.FixtureRequest) -> nn.Module:
    """Both of them in turn."""
    return request.getfixturevalue(request.param)
