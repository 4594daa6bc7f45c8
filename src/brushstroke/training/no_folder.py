"""A replacement for the output folder in runs without one, so that the loop needs no special cases.

It writes nothing; the real folder is in `folder`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.training.checkpoint import Resumable
from brushstroke.training.folder import RunFolder


class NoFolder(RunFolder):
    """No output folder: there is nothing to resume, and writing does nothing."""

    def __init__(self) -> None:
        self.resuming = False

    def __exit__(self, *exc: object) -> None:
        """Do nothing."""

    def claim(self) -> None:
        """Do nothing."""

    def checkpoints(self) -> list[Path]:
        """Return an empty list."""
        return []

    def open(self, step: int, evaluated: int = 0) -> None:
        """Do nothing."""

    def record(self, name: str, line: Mapping[str, Any]) -> None:
        """Do nothing."""

    def save_checkpoint(self, session: Resumable, extra: Mapping[str, Any], best_step: int) -> None:
        """Do nothing."""

    def save_best(self, adapter: Adapter, step: int) -> dict[str, str]:
        """Do nothing."""
        return {}

    def finish(self, adapter: Adapter, summary: Mapping[str, Any]) -> None:
        """Do nothing."""
