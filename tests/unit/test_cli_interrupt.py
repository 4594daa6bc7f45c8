"""Ctrl-C on the command line: the first one ends the command; others are harmless."""

import os
import signal
from collections.abc import Iterator

import pytest

from brushstroke.cli.interrupt import INTERRUPTED, PATIENCE, SigintHandler


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def interrupts() -> Iterator[SigintHandler]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    made = SigintHandler()
    made.install()
    yield made
    signal.signal(signal.SIGINT, before)


def interrupted_again_and_again(done: list[str]) -> None:
    """One interrupt, and one more in each place that it passes on its way out."""
    try:
        try:
            press()
        finally:
            press()
            done.append("undone")
    except KeyboardInterrupt:
        press()
        try:
            raise OSError("no room")
        finally:
            press()
            done.append("reported")


@pytest.mark.usefixtures("interrupts")
def test_cleanup_after_an_interrupt_is_not_interrupted() -> None:
    done: list[str] = []
    for _ in range(2):  # and a later one counts again
        with pytest.raises(OSError, match="no room"):
            interrupted_again_and_again(done)
    assert done == ["undone", "reported"] * 2


def test_an_end_that_takes_long_can_be_cut_short(
    interrupts: SigintHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, now, seen = [], [100.0], []
    monkeypatch.setattr("brushstroke.cli.interrupt.time.monotonic", lambda: now[0])
    monkeypatch.setattr("brushstroke.cli.interrupt.os._exit", ended.append)
    try:
        press()
    except KeyboardInterrupt:
        press()
        seen.append(list(ended))
        now[0] += PATIENCE + 1
        press()
    assert (seen, ended) == ([[]], [INTERRUPTED])
    interrupts.end()
    press()


def test_process_that_ignores_sigint_keeps_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        SigintHandler().install()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
