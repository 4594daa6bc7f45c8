"""Ctrl-C on the command line: the first one ends the command; later ones do not disturb the shutdown.

A training run handles Ctrl-C itself: see `training/interrupt.py`.
"""

import os
import signal
import sys
import threading
import time
from typing import Any

INTERRUPTED = 130  # the exit status
PATIENCE = 5.0  # seconds that the shutdown may take; after that, Ctrl-C ends the process at once


class SigintHandler:
    """A SIGINT handler that raises KeyboardInterrupt, but not while an earlier one is being handled."""

    def __init__(self) -> None:
        self._raised = 0.0

    def install(self) -> None:
        """Replace Python's handler; a process that ignores SIGINT continues to ignore it."""
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    def end(self) -> None:
        """Ignore Ctrl-C from now on, while the process ends."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _handle(self, number: int, frame: Any) -> None:
        if not _on_its_way(sys.exc_info()[1]):
            self._raised = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._raised > PATIENCE:
            os._exit(INTERRUPTED)


def _on_its_way(error: BaseException | None) -> bool:
    """Whether an interrupt, or an exception raised during one, is being handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None
