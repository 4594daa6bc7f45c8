"""Loss at equal tokens and time to a target loss, against PEFT under the Trainer, over seeds.

python benchmarks/loss_curves.py --steps 40 --seeds 0,1,2
"""

import argparse
import math
import statistics

from _common import SIDES, interleaved, keep, prepared, rows_of

WINDOW = 5  # steps that a loss is averaged over


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    rows = rows_of("addresses", options.steps * 8)
    ends: dict[str, list[float]] = {"brushstroke": [], "peft": []}
    ratios = []
    for seed in map(int, options.seeds.split(",")):
        with prepared(rows, seed=seed) as settings:
            runs = {side: found[0] for side, found in interleaved(list(ends), 1, settings).items()}
        for side, run in runs.items():
            ends[side].append(statistics.fmean(run["losses"][-WINDOW:]))
        target = ends["peft"][-1]
        ratios.append(seconds_to(runs["brushstroke"], target) / runs["peft"]["seconds"])
        print(
            f"seed {seed}: final loss {ends['brushstroke'][-1]:.4f}, PEFT's {target:.4f}, "
            f"time to it {ratios[-1]:.2f}x"
        )
    for side, found in ends.items():
        print(f"{SIDES[side]:26} final losses {', '.join(f'{loss:.4f}' for loss in found)}")
    print(
        f"spread of PEFT's seeds {max(ends['peft']) - min(ends['peft']):.4f}, "
        f"time to its loss {statistics.median(ratios):.2f}x"
    )
    reached = [ratio if math.isfinite(ratio) else None for ratio in ratios]
    keep("loss_curves", steps=options.steps, final_losses=ends, time_to_peers_loss=reached)


def seconds_to(run: dict, target: float) -> float:
    """Wall time of the loop until the mean of the last steps' losses is at the target."""
    for step in range(WINDOW, len(run["losses"]) + 1):
        if statistics.fmean(run["losses"][step - WINDOW : step]) <= target:
            return run["seconds"] * step / len(run["losses"])
    return float("inf")


if __name__ == "__main__":
    main()
