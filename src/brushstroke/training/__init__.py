"""Training: the loop, the session, the plan, checkpoints.

It does not print; it reports progress through callbacks.
"""

from brushstroke.training.callback import AdapterCallback
from brushstroke.training.config import TrainConfig
from brushstroke.training.loop import TrainResult, train
from brushstroke.training.plan import Plan, PlanWarning, plan
from brushstroke.training.session import Training

__all__ = [
    "AdapterCallback",
    "Plan",
    "PlanWarning",
    "TrainConfig",
    "TrainResult",
    "Training",
    "plan",
    "train",
]
