"""How much the demo trains and asks, in full and in short, and how long that takes."""

import os
import statistics
import time
from dataclasses import dataclass

import torch

NAMES = ("addresses", "people", "companies")
REFERENCE_GFLOPS = 178.0  # two cores of an AVX2 machine, on which the times below were measured


@dataclass(frozen=True)
class Settings:
    """One form of the demo.

    Args:
        name: "full" or "quick".
        rows: training rows of each adapter, each seen once.
        learning_rate: of all three.
        batch_size: examples in an optimiser step.
        held_out: rows that each adapter is judged on.
        base_rows: how many of the addresses the untouched base is judged on.
        compared: prompts on which the merged model is compared with the adapted one.
        timed: pairs of forward passes that the latencies come from.
        reference_seconds: how long all of it takes at the reference speed.
    """

    name: str
    rows: dict[str, int]
    learning_rate: float
    batch_size: int
    held_out: int
    base_rows: int
    compared: int
    timed: int
    reference_seconds: float

    def estimated_seconds(self) -> float:
        """How long the demo will take on this machine, from the speed of one matrix product."""
        return self.reference_seconds * REFERENCE_GFLOPS / measured_gflops()


FULL = Settings(
    name="full",
    rows={"addresses": 600, "people": 160, "companies": 160},
    learning_rate=3e-3,
    batch_size=4,
    held_out=48,
    base_rows=32,
    compared=16,
    timed=31,
    reference_seconds=470,
)
QUICK = Settings(
    name="quick",
    rows={"addresses": 64, "people": 24, "companies": 16},
    learning_rate=4e-3,
    batch_size=4,
    held_out=40,
    base_rows=4,
    compared=3,
    timed=4,
    reference_seconds=140,
)


def chosen() -> Settings:
    """`BRUSHSTROKE_DEMO=quick` is the short form; unset or "full" the long one."""
    forms = {"": FULL, "full": FULL, "quick": QUICK}
    asked = os.environ.get("BRUSHSTROKE_DEMO", "")
    if asked not in forms:
        raise SystemExit(f"BRUSHSTROKE_DEMO must be quick or full; got {asked!r}")
    return forms[asked]


def measured_gflops() -> float:
    """The speed of a product of the model's own shape, in GFLOP/s: the median of some."""
    x, W = torch.randn(960, 576), torch.randn(1536, 576)
    times = []
    for _ in range(60):
        begun = time.perf_counter()
        torch.nn.functional.linear(x, W)
        times.append(time.perf_counter() - begun)
    return 2 * 960 * 576 * 1536 / statistics.median(times) / 1e9
