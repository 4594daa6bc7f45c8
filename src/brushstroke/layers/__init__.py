"""W + U·V in a live model: attach, banks of adapters with a route for each row, merging.

It knows no files and no training; HF's Conv1D is known by its class name alone.
"""

from brushstroke.layers.attach import Attachment, attach
from brushstroke.layers.bank import Bank, bank, refuse_rows
from brushstroke.layers.check import QuantisedBaseWarning, check_base
from brushstroke.layers.copies import ChangedWeightsWarning
from brushstroke.layers.merge import (
    MergeReport,
    SiteDrift,
    check_forward,
    merge,
    merge_weight,
    require_adapter,
)
from brushstroke.layers.route import Route
from brushstroke.layers.walk import find_sites, unwrap

__all__ = [
    "Attachment",
    "Bank",
    "ChangedWeightsWarning",
    "MergeReport",
    "QuantisedBaseWarning",
    "Route",
    "SiteDrift",
    "attach",
    "bank",
    "check_base",
    "check_forward",
    "find_sites",
    "merge",
    "merge_weight",
    "refuse_rows",
    "require_adapter",
    "unwrap",
]
