"""An adapter is data: site → update, with a card that tells where it comes from.

It knows no live model, no file format and no training.
"""

from brushstroke.adapter.adapter import Adapter
from brushstroke.adapter.card import Card
from brushstroke.adapter.config import LoraConfig
from brushstroke.adapter.fingerprint import Fingerprint, Verdict
from brushstroke.adapter.site import Other, Site, in_all_layers, is_conv1d
from brushstroke.adapter.targets import TargetPlan, resolve_targets

__all__ = [
    "Adapter",
    "Card",
    "Fingerprint",
    "LoraConfig",
    "Other",
    "Site",
    "TargetPlan",
    "Verdict",
    "in_all_layers",
    "is_conv1d",
    "resolve_targets",
]
