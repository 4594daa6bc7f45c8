"""W + U·V in a live model: attach, and banks of adapters with a route for each row.

It knows no files and no training; HF's Conv1D is known by its class name alone.
"""

from brushstroke.layers.attach import Attachment, attach
from brushstroke.layers.bank import Bank, bank, require_uniform_route
from brushstroke.layers.check import QuantisedBaseWarning, check_base
from brushstroke.layers.copies import ChangedWeightsWarning
from brushstroke.layers.full import FullAttachment, FullFineTuning, TrainableAttachment, attach_full
from brushstroke.layers.route import Route
from brushstroke.layers.walk import find_sites, unwrap

__all__ = [
    "Attachment",
    "Bank",
    "ChangedWeightsWarning",
    "FullAttachment",
    "FullFineTuning",
    "QuantisedBaseWarning",
    "Route",
    "TrainableAttachment",
    "attach",
    "attach_full",
    "bank",
    "check_base",
    "find_sites",
    "require_uniform_route",
    "unwrap",
]
