"""Merges W + ΔW into new weights, in memory or from folder to folder, and checks the result.

It prints nothing, and generates no text.
"""

from brushstroke.merging.export import ExportReport, merge_folder
from brushstroke.merging.in_memory import (
    MergeReport,
    SiteDrift,
    check_forward,
    merge,
    merge_weight,
    require_adapter,
)
from brushstroke.merging.rounding import Rounding

__all__ = [
    "ExportReport",
    "MergeReport",
    "Rounding",
    "SiteDrift",
    "check_forward",
    "merge",
    "merge_folder",
    "merge_weight",
    "require_adapter",
]
