"""How much of the machine's limit the training step reaches, and where the rest goes.

The limit: (4·N per computed token + 4·d·vocabulary per trained token) FLOP, N the weights of the adapted
linears, at the speed of the frozen products alone: the model's own shapes, the packed number of rows, both
directions, the same threads and kernels, measured in turns with the steps.

    python benchmarks/gemm_share.py            the share, and a profile by kind of operation
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict

import torch

import brushstroke as bs
from _common import features, keep, prepared, rows_of
from brushstroke.data import Example, encode
from brushstroke.lowrank.matmul import kernels, product

KINDS = {  # the beginning of an operator's name → its kind; the first that fits counts
    "aten::addmm": "products",
    "aten::mm": "products",
    "aten::bmm": "attention",  # by products
    "aten::baddbmm": "attention",
    "aten::_softmax": "attention",
    "aten::mkl_linear": "products",
    "mkldnn::_linear": "products",
    "aten::_scaled_dot_product": "attention",
    "aten::silu": "activation",
    "aten::gelu": "activation",
    "aten::sigmoid": "activation",
    "aten::expand": "other",
    "aten::exp": "loss",
    "aten::amax": "loss",
    "aten::gather": "loss",
    "aten::logsumexp": "loss",
    "aten::_log_softmax": "loss",
    "aten::scatter": "loss",
    "aten::cat": "copies",
    "aten::copy_": "copies",
    "aten::index": "copies",
    "aten::fill_": "copies",
    "aten::add": "adding and multiplying",
    "aten::mul": "adding and multiplying",
    "aten::linalg": "norms",
    "aten::pow": "norms",
    "aten::rsqrt": "norms",
    "aten::sum": "norms",
    "aten::mean": "norms",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("addresses", "instruction", "plain"), default="addresses")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    rows = rows_of(options.task, (options.steps + 1) * options.batch_size)
    with prepared(rows, batch_size=options.batch_size, dtype=options.dtype) as settings:
        base = bs.load_base(settings["base"], dtype=settings["dtype"])
        examples = list(encode(settings["data"], base.tokenizer))
    batches = [examples[i : i + options.batch_size] for i in range(0, len(examples), options.batch_size)]

    with bs.Training(base, bs.LoraConfig(rank=8), learning_rate=1e-3) as run:
        step(run, batches[0])
        shapes = Counter(
            (module.weight.shape[1], module.weight.shape[0]) for module in run.attachment.modules.values()
        )
        shares, speeds = [], []
        for batch in batches[1:]:
            took, computed, passes = step(run, batch)
            with kernels(run.step.kernels):
                limit, speed = limit_seconds(base, shapes, passes)
            shares.append(limit / took)
            speeds.append(speed)
            print(
                f"{computed} computed tokens in {took:.3f} s, limit {limit:.3f} s ({speed:.0f} GFLOP/s): "
                f"{limit / took:.1%}"
            )
        kinds = profile(run, batches[1])
    share = statistics.median(shares)
    print(f"{options.task}, {options.dtype}: {share:.1%} of the GEMM limit (median), {features()}")
    for kind, part in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"  {kind:24} {part:6.1%}")
    keep(
        "gemm_share",
        task=options.task,
        dtype=options.dtype,
        share=share,
        gflops=statistics.median(speeds),
        kinds=kinds,
    )


def step(run: bs.Training, batch: list[Example]) -> tuple[float, int, list[tuple[int, int]]]:
    """Seconds of one optimiser step, its computed tokens, and (computed, trained) tokens of its passes."""
    began = time.perf_counter()
    result = run.forward_backward(batch)
    run.optim_step()
    took = time.perf_counter() - began
    return took, result.computed_tokens, [(p.computed_tokens, p.trained_tokens) for p in run.passes(batch)]


@torch.no_grad()
def limit_seconds(base: bs.Base, shapes: Counter, passes: list[tuple[int, int]]) -> tuple[float, float]:
    """The time of all frozen products of a step at the speed of the sites' own, and that speed in GFLOP/s."""
    head = base.model.get_output_embeddings().weight
    seconds = flop = of_head = 0.0
    for computed, trained in passes:
        for (d, h), count in shapes.items():
            seconds += count * product_seconds(computed, torch.randn(h, d, dtype=head.dtype))
            flop += count * 4 * computed * d * h
        of_head += 4 * trained * head.numel()
    speed = flop / seconds
    return (flop + of_head) / speed, speed / 1e9


def product_seconds(n: int, weight: torch.Tensor, repeats: int = 7) -> float:
    """The median time of x·W and of dy·Wᵀ together."""
    h, d = weight.shape
    x, dy = torch.randn(n, d, dtype=weight.dtype), torch.randn(n, h, dtype=weight.dtype)
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        product(x, weight)
        product(dy, weight.mT)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def profile(run: bs.Training, batch: list[Example]) -> dict[str, float]:
    """The share of each kind of operation in a step's time on the calling thread."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        step(run, batch)
    kinds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        name = event.key
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), "other")
        kinds[kind] += event.self_cpu_time_total
    total = sum(kinds.values())
    return {kind: value / total for kind, value in kinds.items()}


if __name__ == "__main__":
    main()
