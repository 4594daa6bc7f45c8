"""Adapters on disk; PEFT's layout is the one that brushstroke writes."""

from brushstroke.formats.peft import ADAPTER_FILES, check_overwrite, load, remove, restore, save

__all__ = ["ADAPTER_FILES", "check_overwrite", "load", "remove", "restore", "save"]
