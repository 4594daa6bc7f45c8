"""Shows the progress of `train` in a terminal or a notebook.

The command line has its own display (`cli/progress.py`).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from brushstroke.training.events import EvalEvent, StepEvent


class Bar:
    """A bar of optimiser steps with the last losses; shows nothing without a tqdm bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._losses: dict[str, str] = {}

    def step(self, event: StepEvent) -> None:
        """Show one optimiser step."""
        self._show("loss", event.loss)
        if self._bar is not None:
            self._bar.update(event.step - self._bar.n)

    def evaluation(self, event: EvalEvent) -> None:
        """Show one evaluation."""
        self._show("evaluation", event.loss)

    def _show(self, name: str, loss: float) -> None:
        self._losses[name] = f"{loss:.4f}"
        if self._bar is not None:
            self._bar.set_postfix(self._losses, refresh=False)


@contextmanager
def step_bar(steps: int, done: int, asked: bool | None) -> Iterator[Bar]:
    """Context manager: a bar for a run of this many steps.

    Args:
        steps: of the whole run.
        done: steps of the run before it was resumed.
        asked: whether to show it; None shows it if stderr is a terminal, or in a notebook.
    """
    if not (sys.stderr.isatty() or _in_notebook() if asked is None else asked):
        yield Bar(None)
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, initial=done, desc="training", unit="step") as bar:
        yield Bar(bar)


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config
