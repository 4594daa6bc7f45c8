"""Shows the progress of a training run: a live line on a terminal, elsewhere plain lines at intervals.

It receives the run's events and changes nothing.
"""

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from brushstroke.cli.console import people, print_text, room, size
from brushstroke.cli.layout import fit

if TYPE_CHECKING:
    from brushstroke.training.events import EvalEvent, StepEvent
    from brushstroke.training.plan import Plan

LINE_SECONDS = 10.0  # least time between two plain lines
LEAST_SECONDS = 2.0  # after which the progress of tokenising is shown
WINDOW_SECONDS = 60.0  # time span of the steps from which the speed is computed
LEAST_BAR = 4  # cells
WITHOUT = ("peak", "speed")  # parts of the live line that a narrow terminal omits, in this order


class TimeLeft:
    """Estimates the seconds until the end of a run from its last steps and its evaluations so far.

    Args:
        steps: number of steps of the whole run.
        tokens_per_step: average number of computed tokens of a step, from the plan.
        evaluations: number of evaluations of the whole run.
        done: number of steps that were done before the run was resumed.
    """

    def __init__(self, steps: int, tokens_per_step: float, evaluations: int = 0, done: int = 0) -> None:
        self._steps, self._per_step, self._evaluations = steps, tokens_per_step, evaluations
        self._done, self._tokens = done, 0
        self._began_at = done
        self._recent: deque[tuple[float, int]] = deque()
        self._eval_seconds: list[float] = []

    def step(self, seconds: float, computed_tokens: int) -> None:
        """Record one optimiser step."""
        self._done += 1
        self._tokens += computed_tokens
        self._recent.append((seconds, computed_tokens))
        while len(self._recent) > 8 and sum(s for s, _ in self._recent) - self._recent[0][0] > WINDOW_SECONDS:
            self._recent.popleft()

    def evaluation(self, seconds: float) -> None:
        """Record one evaluation."""
        self._eval_seconds.append(seconds)

    @property
    def seconds(self) -> float | None:
        """The estimate; None before the first step."""
        seconds, tokens = (
            (sum(column) for column in zip(*self._recent, strict=True)) if self._recent else (0, 0)
        )
        if not tokens:
            return None
        ahead = self._per_step * (self._steps - self._began_at) - self._tokens
        left = max(0.0, ahead) if self._done < self._steps else 0.0
        to_evaluate = max(0, self._evaluations - len(self._eval_seconds))
        each = sum(self._eval_seconds) / len(self._eval_seconds) if self._eval_seconds else 0.0
        return seconds / tokens * left + to_evaluate * each


def clock(seconds: float | None) -> str:
    """Format a duration.

    >>> clock(7.6), clock(252), clock(7300), clock(None)
    ('8 s', '4:12 min', '2:01 h', '?')
    """
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


class TrainProgress:
    """Context manager whose methods are the callbacks of a run."""

    def __init__(self) -> None:
        self.steps_done = 0
        self._console = people()
        self._live: Any = None
        self._left: TimeLeft | None = None
        self._last_line = self._last_step = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=16)

    def start(self, plan: "Plan", resumed_from: int, evaluations: int = 0) -> None:
        """Begin to show a run with this plan."""
        per_step = plan.computed_tokens * (plan.epochs / max(1, plan.steps))
        self._left = TimeLeft(plan.steps, per_step, evaluations, resumed_from)
        self._last_step = time.monotonic()
        if self._console.is_terminal:
            self._live = _live(self._console)
            self._task = self._live.add_task("", total=plan.steps, completed=resumed_from, status="")
            self._live.start()

    def step(self, event: "StepEvent") -> None:
        """Show one optimiser step."""
        now = time.monotonic()
        seconds, self._last_step = max(event.seconds, now - self._last_step), now
        self.steps_done += 1
        self._recent.append((seconds, event.real_tokens))
        if self._left is not None:
            self._left.step(seconds, event.computed_tokens)
        if self._live is not None:
            self._live.update(self._task, completed=event.step, status=self._status(event))
        elif event.step == event.steps or self.steps_done == 1 or now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print_text(self._console, f"step {event.step}/{event.steps}  {self._status(event)}")

    def evaluation(self, event: "EvalEvent") -> None:
        """Show one evaluation."""
        self._last_step = time.monotonic()
        if self._left is not None:
            self._left.evaluation(event.seconds)
        best = "  (best)" if event.best else ""
        when = f"after step {event.step}" if event.step else "before the first step"
        print_text(self._console, f"evaluation {when}: loss {event.loss:.4f}{best}")

    def __enter__(self) -> "TrainProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _status(self, event: "StepEvent") -> str:
        seconds, tokens = (sum(column) for column in zip(*self._recent, strict=True))
        speed = tokens / seconds if seconds else 0.0
        left = clock(self._left.seconds if self._left is not None else None)
        parts = [
            ("loss", f"loss {event.loss:.4f}"),
            ("speed", f"{speed:,.0f} tokens/s"),
            ("left", f"{left} left"),
            ("peak", f"peak {size(event.peak_memory_bytes)}"),
        ]
        width = room(self._console)
        if width is None:
            return "  ".join(text for _, text in parts)
        used = len(f"step {event.steps}/{event.steps}  ") + LEAST_BAR
        return fit(parts, width - used, WITHOUT)


class RowsProgress:
    """Context manager that shows how many rows were encoded: a bar on a terminal, elsewhere plain lines."""

    def __init__(self, name: str) -> None:
        self._name, self._console = name, people()
        self._live: Any = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> "RowsProgress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, done: int, count: int) -> None:
        """Show that some of the rows are done."""
        now = time.monotonic()
        if now - self._began < LEAST_SECONDS:
            return
        left = clock((now - self._began) / done * (count - done))
        if self._console.is_terminal:
            if self._live is None:
                self._live = _live(self._console, "tokens of row")
                self._task = self._live.add_task("", total=count, status="")
                self._live.start()
            self._live.update(self._task, completed=done, status=f"{left} left")
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print_text(self._console, f"{self._name}: tokens of row {done:,}/{count:,}  {left} left")


def _live(console: Any, what: str = "step") -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        refresh_per_second=4,
    )
