"""An adapter is data: site → update, with a card that tells where it comes from.

It knows no live model, no file format and no training.
"""

from brushstroke.adapter.adapter import Adapter
from brushstroke.adapter.card import Card, one_template
from brushstroke.adapter.config import LoraConfig
from brushstroke.adapter.fingerprint import Fingerprint, Verdict
from brushstroke.adapter.site import Site, is_conv1d
from brushstroke.adapter.targets import TargetPlan, resolve_targets

__all__ = [
    "Adapter",
    "Card",
    "Fingerprint",
    "LoraConfig",
    "Site",
    "TargetPlan",
    "Verdict",
    "is_conv1d",
    "one_template",
    "resolve_targets",
]
