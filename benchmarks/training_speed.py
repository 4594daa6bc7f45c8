"""Training speed and memory against PEFT with transformers' Trainer, on the address rows.

Each run is a process of its own; brushstroke and its peer take turns. Both see the same rows, batch size,
number of steps, rank, targets and learning rate. Run it on a quiet machine:

    python benchmarks/training_speed.py --steps 24 --rounds 3
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "demo"))

import assets  # noqa: E402
import tasks  # noqa: E402

RUNNERS = {"brushstroke": "_run_brushstroke.py", "PEFT + Trainer": "_run_peft_trainer.py"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="append the figures to this file, a line a benchmark")
    options = parser.parse_args()

    base = assets.model_path()
    rows = tasks.read_task("addresses", assets.labelled_file("addresses")).training
    rows = rows[: options.steps * options.batch_size]
    settings = {
        "base": str(base),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "dtype": options.dtype,
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNNERS}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        for _ in range(options.rounds):
            for name, script in RUNNERS.items():
                runs[name].append(one_run(script, {**settings, "data": str(data), "out": scratch}))
                print(f"{name:16} {describe(runs[name][-1])}", file=sys.stderr, flush=True)
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    report(middle, options.rounds)
    if options.json:
        record = {
            "benchmark": "training_speed",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {cpu_features()}",
            "settings": {key: settings[key] for key in ("steps", "batch_size", "learning_rate", "dtype")},
            "medians": middle,
        }
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def one_run(script: str, settings: dict[str, object]) -> dict[str, float]:
    """Run one side in a process of its own: what it measured, and its wall time from outside."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(HERE / script), json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    outside = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "outside_seconds": outside}


def describe(run: dict[str, float]) -> str:
    return (
        f"{run['real_tokens_per_second']:7.1f} real tokens/s   {run['peak_bytes'] / 2**30:5.2f} GiB   "
        f"mean loss {run['mean_loss']:.4f}   loop {run['seconds']:6.1f} s   "
        f"start and end {run['outside_seconds'] - run['seconds']:5.1f} s"
    )


def report(middle: dict[str, dict[str, float]], rounds: int) -> None:
    ours, peer = middle.values()
    print(f"medians of {rounds} interleaved rounds, {time.strftime('%Y-%m-%d')}, {cpu_features()}")
    for name, run in middle.items():
        print(f"{name:16} {describe(run)}")
    print(
        f"speed {ours['real_tokens_per_second'] / peer['real_tokens_per_second']:.2f}x   "
        f"memory {ours['peak_bytes'] / peer['peak_bytes']:.2f}x   "
        f"mean loss {ours['mean_loss'] / peer['mean_loss'] - 1:+.1%}"
    )


def cpu_features() -> str:
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
