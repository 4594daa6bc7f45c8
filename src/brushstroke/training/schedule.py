"""Learning-rate schedules: the factor that multiplies the learning rate in each step.

They have no state, so a checkpoint does not store them.
"""

import math
from collections.abc import Callable

Schedule = Callable[[float], float]  # progress after the warm-up, 0 to 1 → factor

SCHEDULES: dict[str, Schedule] = {
    "linear": lambda progress: max(0.0, 1.0 - progress),
    "cosine": lambda progress: max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))),
    "constant": lambda progress: 1.0,
}


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: `warmup` itself, or that share of the run if it is below 1.

    >>> warmup_steps(0.1, 50), warmup_steps(20, 50)
    (5, 20)
    """
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def factor(schedule: str, step: int, total: int, warmup: float = 0.0) -> float:
    """The factor for a step (counted from 0) of a run of `total` steps, as in the Hugging Face Trainer.

    >>> [factor("linear", step, 4) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    ramp = warmup_steps(warmup, total)
    if step < ramp:
        return step / max(1, ramp)
    return SCHEDULES[schedule]((step - ramp) / max(1, total - ramp))
