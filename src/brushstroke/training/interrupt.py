"""Delays Ctrl-C until an optimiser step or a write is complete.

It installs no handler outside the main thread.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DeferredInterrupts:
    """Context manager: the first SIGINT raises KeyboardInterrupt, but not before a `deferred` block ends.

    Later ones do nothing: the checkpoint is being written at that time.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._pending = False
        self._raised = False
        self._before: Any = None

    def __enter__(self) -> "DeferredInterrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager: delay an interrupt until the end of the block."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            if self._pending:
                self._raise()

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring:
            self._pending = True
        else:
            self._raise()

    def _raise(self) -> None:
        self._pending = False
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """Ignore Ctrl-C from now on: for a process that ends after an interrupted run has saved its state."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
