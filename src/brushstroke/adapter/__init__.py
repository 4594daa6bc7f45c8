"""Adapters as data: a mapping from sites to updates, and a card that records where the adapter comes from.

Does not use live models or file formats, and does not train.
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
