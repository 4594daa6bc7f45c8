"""Training speed and memory against the peers, on the same rows with the same settings.

Each run is a process of its own; the sides take turns. Run it on a quiet machine:

    python benchmarks/training_speed.py --task addresses --steps 24

The ratio of two sides is paired by round: the geometric mean with its 95 % interval. All rounds are stored.
"""

import argparse
import time

from _common import SIDES, describe, features, interleaved, keep, medians, paired_ratio, prepared, rows_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=("addresses", "instruction", "plain"), default="addresses")
    parser.add_argument("--sides", default="brushstroke,peft,best", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--peer-parts",
        type=int,
        default=1,
        help="accumulate a peer's step over so many parts, to bear its memory",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", choices=("nf4",), help="of the base, for brushstroke and PEFT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", help="another base model; SmolLM2-135M by default")
    options = parser.parse_args()
    if options.peer_parts < 1 or options.batch_size % options.peer_parts:
        parser.error(f"--peer-parts {options.peer_parts} must divide --batch-size {options.batch_size}")

    rows = rows_of(options.task, options.steps * options.batch_size)
    names = ("batch_size", "peer_parts", "learning_rate", "dtype", "quantize", "device", "base")
    chosen = {name: getattr(options, name) for name in names}
    with prepared(rows, **chosen) as settings:
        runs = interleaved(options.sides.split(","), options.rounds, settings)
    middle = {side: medians(found) for side, found in runs.items()}

    print(
        f"{options.task}: medians of {options.rounds} interleaved rounds, {time.strftime('%Y-%m-%d')}, "
        f"{features()}"
    )
    ratios = {}
    for side, run in middle.items():
        print(f"{SIDES[side]:26} {describe(run)}")
        if "brushstroke" not in runs or side == "brushstroke":
            continue
        figures = ("real_tokens_per_second", "peak_bytes", "mean_loss")
        ratios[side] = {
            name: paired_ratio([r[name] for r in runs["brushstroke"]], [r[name] for r in runs[side]])
            for name in figures
        }
        speed, memory, loss = (ratios[side][name] for name in figures)
        print(
            f"{'':26} brushstroke: {speed[0]:.2f}x the speed [{speed[1]:.2f}, {speed[2]:.2f}], "
            f"{memory[0]:.2f}x the memory, mean loss {loss[0] - 1:+.1%}"
        )
    reported = {name: getattr(options, name) for name in ("task", "steps", "rounds")}
    keep("training_speed", **reported, **chosen, medians=middle, ratios=ratios, every_round=runs)


if __name__ == "__main__":
    main()
