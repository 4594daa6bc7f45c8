"""Speed over the first steps and start-up time by the number of examples, and memory over a long run.

The start is that of `train` on a base that is loaded: reading, encoding, probing, the plan.

python benchmarks/scaling.py
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import brushstroke as bs
from _common import in_own_process, keep, prepared, rows_of

THIS = Path(__file__).resolve()
SIZES = (100, 1_000, 10_000, 100_000)
PERIOD = 100  # rows that are repeated, each time with another number behind


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--long", type=int, default=300, help="steps of the run whose memory is watched")
    options = parser.parse_args()
    tenth = max(1, options.long // 10)
    by_size = {}
    for size in SIZES:
        by_size[size] = in_own_process(THIS, {"examples": size, "steps": options.steps})
        print(
            f"{size:7} examples: {by_size[size]['speed']:6.1f} real tokens/s, "
            f"start {by_size[size]['start']:5.1f} s"
        )
    long = in_own_process(THIS, {"examples": 8 * options.long, "steps": options.long})
    early, late = (long["peaks"][i] / 2**30 for i in (tenth - 1, -1))
    print(f"{options.long} steps: peak {early:.2f} GiB after a tenth, {late:.2f} GiB at the end")
    keep(
        "scaling",
        steps=options.steps,
        by_size=by_size,
        long_steps=options.long,
        long_peaks=[long["peaks"][0], *long["peaks"][tenth - 1 :: tenth]],  # the first, and each tenth's end
    )


def one(settings: dict) -> None:
    """Train on so many examples; the first steps count."""
    rows = rows_of("addresses", min(PERIOD, settings["examples"]))
    repeated = [
        {"messages": numbered(rows[i % len(rows)]["messages"], i)} for i in range(settings["examples"])
    ]
    steps: list[float] = []
    peaks: list[int] = []
    with prepared(repeated) as run:
        base = bs.load_base(run["base"], dtype="float32", device="cpu")
        began = time.perf_counter()
        starts: list[float] = []
        result = bs.train(
            base,
            run["data"],
            bs.LoraConfig(rank=8),
            bs.TrainConfig(max_steps=settings["steps"]),
            on_plan=lambda *_: starts.append(time.perf_counter() - began),
            on_step=lambda event: (
                steps.append(event.real_tokens / event.seconds),
                peaks.append(event.peak_memory_bytes),
            ),
        )
    print(
        json.dumps(
            {
                "start": starts[0],
                "speed": result.summary["real_tokens_per_second"],
                "median": statistics.median(steps),
                "peaks": peaks,
            }
        )
    )


def numbered(messages: list[dict], number: int) -> list[dict]:
    """The same messages with a number at the end of the question, so that no two rows are equal."""
    return [{**m, "content": f"{m['content']} #{number}"} if m["role"] == "user" else m for m in messages]


if __name__ == "__main__":
    one(json.loads(sys.argv[1])) if len(sys.argv) > 1 and sys.argv[1].startswith("{") else main()
