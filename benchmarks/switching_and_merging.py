"""Switching the route of a whole model, and the forward latency of a merged model against its base.

python benchmarks/switching_and_merging.py
"""

import statistics
import time

import torch

import brushstroke as bs
from _common import keep
from brushstroke.samples import model_path

ROUNDS = 60


def random_adapter(base: bs.Base, seed: int) -> bs.Adapter:
    with bs.attach(base, bs.LoraConfig(rank=8), seed=seed) as attachment:
        fresh = attachment.adapter()
    generator = torch.Generator().manual_seed(seed)
    updates = {
        site: bs.LowRank(update.U, 0.01 * torch.randn(update.V.shape, generator=generator), update.scale)
        for site, update in fresh.items()
    }
    return bs.Adapter(updates, fresh.card)


@torch.no_grad()
def main() -> None:
    base = bs.load_base(model_path(), dtype="float32")
    adapters = {name: random_adapter(base, seed) for seed, name in enumerate(("a", "b", "c"))}
    with bs.bank(base, adapters) as bank:
        times = []
        for i in range(1000):
            began = time.perf_counter()
            bank.use(("a", "b", "c", None)[i % 4])
            times.append(time.perf_counter() - began)
    print(f"switch the route of {len(adapters['a'])} sites: median {1e3 * statistics.median(times):.4f} ms")

    merged = bs.merge(base, adapters["a"])
    tokens = torch.randint(0, 49152, (4, 128), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"base": [], "merged": []}
    for i in range(ROUNDS):
        pair = [("base", base.model), ("merged", merged.model)]
        for name, model in pair if i % 2 else pair[::-1]:
            began = time.perf_counter()
            model(tokens, use_cache=False)
            seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(found[5:]) for name, found in seconds.items()}
    print(
        f"4x128 tokens: base {1e3 * middle['base']:.0f} ms, merged {1e3 * middle['merged']:.0f} ms, "
        f"ratio {middle['merged'] / middle['base']:.3f}"
    )
    same = [type(a) is type(b) for a, b in zip(base.model.modules(), merged.model.modules(), strict=True)]
    print(f"same classes of modules: {all(same)}")
    keep(
        "switching_and_merging",
        switch_seconds=statistics.median(times),
        latency=middle,
        ratio=middle["merged"] / middle["base"],
        same_classes=all(same),
    )


if __name__ == "__main__":
    main()
