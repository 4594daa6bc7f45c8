"""Runs W + U·V in a live model: `attach`, and banks of adapters with a route for each row.

It reads no files, trains nothing, and does not import transformers (HF's Conv1D is recognised by class name).
"""

from brushstroke.layers.attach import Attachment, attach
from brushstroke.layers.bank import Bank, bank, find_route, require_uniform_route
from brushstroke.layers.full import FullAttachment, FullFineTuning, TrainableAttachment, attach_full
from brushstroke.layers.route import Route

__all__ = [
    "Attachment",
    "Bank",
    "FullAttachment",
    "FullFineTuning",
    "Route",
    "TrainableAttachment",
    "attach",
    "attach_full",
    "bank",
    "find_route",
    "require_uniform_route",
]
