"""Training: the loop, the session, the plan, checkpoints.

It does not print; it reports progress through callbacks. `callback` is not imported here, because it imports
transformers' Trainer, which takes two seconds.
"""

from brushstroke.training.config import TrainConfig
from brushstroke.training.loop import TrainResult, train
from brushstroke.training.plan import Plan, PlanWarning, plan
from brushstroke.training.session import Training

__all__ = [
    "Plan",
    "PlanWarning",
    "TrainConfig",
    "TrainResult",
    "Training",
    "plan",
    "train",
]
