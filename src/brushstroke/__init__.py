"""brushstroke: low-rank adaptation of any PyTorch network.

A pretrained weight W (d×h) stays frozen; an adapter adds scale·U·V with U (d×r) and V (r×h). The names below
are loaded when they are first used, so that importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brushstroke import errors as errors
    from brushstroke.adapter import Adapter, Card, LoraConfig
    from brushstroke.analysis import intruders, relate, spectrum, subspace
    from brushstroke.base import Base, load_base
    from brushstroke.data import Example
    from brushstroke.formats import load, save
    from brushstroke.inference import Answer, ChatSession, Evaluation, evaluate, generate
    from brushstroke.layers import Attachment, Bank, attach, bank
    from brushstroke.lowrank import LowRank
    from brushstroke.merging import MergeReport, merge, merge_folder
    from brushstroke.training import Plan, TrainConfig, Training, TrainResult, plan, train
    from brushstroke.training.callback import AdapterCallback

__version__ = "0.1.0"

_HOMES = {
    "brushstroke.adapter": ("Adapter", "Card", "LoraConfig"),
    "brushstroke.analysis": ("intruders", "relate", "spectrum", "subspace"),
    "brushstroke.base": ("Base", "load_base"),
    "brushstroke.data": ("Example",),
    "brushstroke.formats": ("load", "save"),
    "brushstroke.inference": ("Answer", "ChatSession", "Evaluation", "evaluate", "generate"),
    "brushstroke.layers": ("Attachment", "Bank", "attach", "bank"),
    "brushstroke.merging": ("MergeReport", "merge", "merge_folder"),
    "brushstroke.lowrank": ("LowRank",),
    "brushstroke.training": (
        "Plan",
        "TrainConfig",
        "TrainResult",
        "Training",
        "plan",
        "train",
    ),
    "brushstroke.training.callback": ("AdapterCallback",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterCallback",
    "Answer",
    "Attachment",
    "Bank",
    "Base",
    "Card",
    "ChatSession",
    "Evaluation",
    "Example",
    "LoraConfig",
    "LowRank",
    "MergeReport",
    "Plan",
    "TrainConfig",
    "TrainResult",
    "Training",
    "attach",
    "bank",
    "errors",
    "evaluate",
    "generate",
    "intruders",
    "load",
    "load_base",
    "merge",
    "merge_folder",
    "plan",
    "relate",
    "save",
    "spectrum",
    "subspace",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("brushstroke.errors")
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'brushstroke' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
