"""Training: the loop, the packed step, the plan, checkpoints.

It knows no terminal: progress goes out through a callback.
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
