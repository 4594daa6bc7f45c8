"""Ctrl-C that never cuts an optimiser step or a write in two.

It installs nothing outside the main thread.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DeferredInterrupts:
    """While open, the first SIGINT raises KeyboardInterrupt, but waits for the end of a `held` block.

    Later ones do nothing: what is to be kept is being written then.
    """

    def __init__(self) -> None:
        self._held = False
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
    def held(self) -> Iterator[None]:
        """Inside, an interrupt waits."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._pending:
                self._raise()

    def _handle(self, number: int, frame: Any) -> None:
        if self._held:
            self._pending = True
        else:
            self._raise()

    def _raise(self) -> None:
        self._pending = False
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt


def ignore_interrupts() -> None:
    """From now on Ctrl-C does nothing: for a process that ends with what an interrupted run kept."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
