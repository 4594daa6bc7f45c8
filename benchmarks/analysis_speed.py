"""The analysis in factor form against dense maths: singular values, grids of φ, adapters of a large model.

python benchmarks/analysis_speed.py            takes some minutes: a dense SVD at 4096×4096 is slow
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import brushstroke as bs
from _common import in_own_process, keep
from brushstroke.analysis.overlap import overlap_grid, random_directions
from brushstroke.packed.memory import peak_memory

SIDE = 4096
SHAPES_7B = {  # of each of 32 layers, d×h
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    "gate_proj": (4096, 11008),
    "up_proj": (4096, 11008),
    "down_proj": (11008, 4096),
}


def main() -> None:
    for rank in (8, 64):
        keep("analysis: singular values", **singular_values(rank))
    keep("analysis: grid of φ", **grid())
    found = in_own_process(Path(__file__).resolve(), {})
    peak = found["peak_memory_bytes"] / 2**30
    print(f"{found['sites']} sites compared in {found['seconds']:.1f} s, peak {peak:.2f} GiB")
    keep("analysis: two adapters of a 7B model", **found)


def singular_values(rank: int) -> dict[str, float]:
    """σ of U·V from the factors (median of several) against the dense SVD of the same fp32 product (once)."""
    generator = torch.Generator().manual_seed(rank)
    update = bs.LowRank(
        torch.randn(SIDE, rank, generator=generator), torch.randn(rank, SIDE, generator=generator)
    )
    found = update.sigma
    fast = timed(lambda: update.sigma, 9)
    dense = update.dense().float()
    began = time.perf_counter()
    expected = torch.linalg.svd(dense, full_matrices=False).S[:rank].double()
    slow = time.perf_counter() - began
    worst = float(((found - expected) / expected).abs().max())
    reported = f"{1e3 * fast:.2f} ms, dense {slow:.1f} s, {slow / fast:,.0f}×, off {worst:.1e}"
    print(f"σ at {SIDE}×{SIDE}, r = {rank}: {reported}")
    times = {"seconds": fast, "dense_seconds": slow, "ratio": slow / fast}
    return {"rank": rank, **times, "relative_error": worst}


def grid() -> dict[str, float]:
    """φ(i, j) of 64 against 64 directions at once, against the loop of norms, both on the same directions."""
    generator = torch.Generator().manual_seed(0)
    first, second = (random_directions(768, 64, generator) for _ in range(2))
    fast = timed(lambda: overlap_grid(first, second), 99)

    def loop() -> torch.Tensor:
        cells = torch.empty(64, 64, dtype=torch.float64)
        for i in range(1, 65):
            for j in range(1, 65):
                cells[i - 1, j - 1] = (first[:, :i].mT @ second[:, :j]).norm() ** 2 / min(i, j)
        return cells

    slow = timed(loop, 3)
    worst = float((loop() - overlap_grid(first, second)).abs().max())
    print(f"φ, 64×64: {1e3 * fast:.3f} ms, loop {slow:.2f} s, {slow / fast:,.0f}×, off {worst:.1e}")
    return {"seconds": fast, "loop_seconds": slow, "ratio": slow / fast, "difference": worst}


def child() -> dict[str, float]:
    """Compare two random adapters of a 7B-shaped model: 224 sites, r = 16."""
    generator = torch.Generator().manual_seed(0)
    one, two = (
        bs.Adapter(
            {
                f"model.layers.{layer}.{name}": bs.LowRank(
                    torch.randn(d, 16, generator=generator), torch.randn(16, h, generator=generator)
                )
                for layer in range(32)
                for name, (d, h) in SHAPES_7B.items()
            }
        )
        for _ in range(2)
    )
    began = time.perf_counter()
    found = bs.subspace(one, two)
    seconds = time.perf_counter() - began
    peak = peak_memory(torch.device("cpu"))
    return {"sites": len(found), "seconds": seconds, "peak_memory_bytes": peak}


def timed(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    print(json.dumps(child())) if len(sys.argv) > 1 else main()
