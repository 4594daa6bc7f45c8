"""Adapters on disk; PEFT's layout is the one that brushstroke writes."""

from brushstroke.formats.peft import (
    ADAPTER_FILES,
    UnfinishedRunWarning,
    as_files,
    check_output,
    remove,
    require_savable,
    save,
)
from brushstroke.formats.registry import Format, load, register_format

__all__ = [
    "ADAPTER_FILES",
    "Format",
    "UnfinishedRunWarning",
    "as_files",
    "check_output",
    "load",
    "register_format",
    "remove",
    "require_savable",
    "save",
]
