"""The bar of `train`: in a terminal, on request, and never otherwise."""

import io
import re
import sys
from typing import Any

import pytest

from brushstroke.training.events import EvalEvent, StepEvent
from brushstroke.training.progress import step_bar


def events(count: int) -> list[StepEvent]:
    facts: dict[str, Any] = dict.fromkeys(
        ("real_tokens", "trained_tokens", "computed_tokens", "peak_memory_bytes"), 1
    )
    return [
        StepEvent(step=n, steps=count, loss=1 / n, seconds=0.1, learning_rate=0.1, **facts)
        for n in range(1, count + 1)
    ]


def shown(asked: bool | None, done: int = 0) -> None:
    with step_bar(4, done, asked) as bar:
        bar.evaluation(EvalEvent(0, 3.0, 5, 0.1, True))
        for event in events(4)[done:]:
            bar.step(event)


def test_a_file_gets_no_bar_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, length in ((None, 0), (False, 0), (True, 1)):
        said = io.StringIO()
        monkeypatch.setattr(sys, "stderr", said)
        shown(asked)
        assert bool(said.getvalue()) == bool(length)
    last = said.getvalue().split("\r")[-1]
    assert "4/4" in last
    assert "loss=0.2500" in last
    assert "evaluation=3.0000" in last


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_begins_at_the_resumed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    shown(None, done=2)
    found = re.findall(r"(\d)/4", terminal.getvalue())
    assert (found[0], found[-1]) == ("2", "4")
