"""The plan's estimate of the peak memory against what a run then used, over five settings.

python benchmarks/memory_estimate.py
"""

import json
import sys
from pathlib import Path

import brushstroke as bs
from _common import in_own_process, keep, prepared, rows_of

SETTINGS = (
    {"task": "addresses", "batch_size": 8, "rank": 8, "memory": "fast", "gradient_checkpointing": False},
    {"task": "addresses", "batch_size": 8, "rank": 8, "memory": "low", "gradient_checkpointing": False},
    {"task": "addresses", "batch_size": 8, "rank": 8, "memory": "fast", "gradient_checkpointing": True},
    {"task": "instruction", "batch_size": 8, "rank": 8, "memory": "fast", "gradient_checkpointing": False},
    {"task": "plain", "batch_size": 8, "rank": 64, "memory": "fast", "gradient_checkpointing": False},
)
STEPS = 3


def main() -> None:
    found = []
    for setting in SETTINGS:
        estimate, peak = in_own_process(Path(__file__).resolve(), setting)
        found.append({**setting, "estimate": estimate, "peak": peak})
        reported = ", ".join(f"{name} {value}" for name, value in setting.items())
        print(
            f"{reported}: estimate {estimate / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB, "
            f"{estimate / peak - 1:+.1%}"
        )
    keep("memory_estimate", settings=found)


def one(setting: dict) -> None:
    """One run in this process: (estimate, peak) in bytes."""
    size = setting["batch_size"]
    plans: list[bs.Plan] = []
    with prepared(rows_of(setting["task"], STEPS * size), batch_size=size) as run:
        base = bs.load_base(run["base"], dtype="float32", device="cpu")
        config = bs.TrainConfig(
            max_steps=STEPS,
            batch_size=size,
            memory=setting["memory"],
            gradient_checkpointing=setting["gradient_checkpointing"],
        )
        lora = bs.LoraConfig(rank=setting["rank"])
        result = bs.train(base, run["data"], lora, config, on_plan=lambda plan, _: plans.append(plan))
    print(json.dumps([plans[0].memory_bytes, result.summary["peak_memory_bytes"]]))


if __name__ == "__main__":
    one(json.loads(sys.argv[1])) if len(sys.argv) > 1 else main()
