"""Adapters on disk; PEFT's layout is the one that brushstroke writes."""

from brushstroke.formats.peft import load, save

__all__ = ["load", "save"]
