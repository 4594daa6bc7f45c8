"""Adapters on disk; PEFT's layout is the one that brushstroke writes."""

from brushstroke.formats.peft import ADAPTER_FILES, as_files, check_output, load, remove, save

__all__ = ["ADAPTER_FILES", "as_files", "check_output", "load", "remove", "save"]
