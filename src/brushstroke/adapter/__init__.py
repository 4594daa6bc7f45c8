"""An adapter is data: site → update, with a card that says where it comes from.

It knows no live model, no file format and no training.
"""

from brushstroke.adapter.adapter import Adapter
from brushstroke.adapter.card import Card
from brushstroke.adapter.config import LoraConfig
from brushstroke.adapter.fingerprint import Fingerprint, Verdict

__all__ = [
    "Adapter",
    "Card",
    "Fingerprint",
    "LoraConfig",
    "Verdict",
]
