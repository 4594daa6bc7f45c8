"""The events that a run reports for its steps and evaluations, and their totals.

It writes no files.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step, as written to `metrics.jsonl`.

    Args:
        step: number of the step, counted from 1.
        steps: number of steps in the run.
        loss: per trained token, in nats.
        real_tokens, trained_tokens, computed_tokens: of this step.
        seconds: of this step, wall time.
        learning_rate: used in this step.
        peak_memory_bytes: of the process so far (of the device on a GPU).
    """

    step: int
    steps: int
    loss: float
    real_tokens: int
    trained_tokens: int
    computed_tokens: int
    seconds: float
    learning_rate: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class EvalEvent:
    """One evaluation, as written to `eval.jsonl`; `best` if its loss is lower than all earlier ones."""

    step: int
    loss: float
    trained_tokens: int
    seconds: float
    best: bool


@dataclass
class Totals:
    """Sums over the steps of a run, and its best evaluation; checkpoints store them."""

    real_tokens: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    final_loss: float = float("nan")
    best_loss: float = float("inf")
    best_step: int = 0
    best_sums: dict[str, str] = field(default_factory=dict)  # checksums of the files of that step's adapter
    evaluated: int = 0
    eval_loss_before: float | None = None  # before the first step
    eval_loss: float | None = None  # of the last evaluation
    not_better: int = 0  # number of evaluations since the best one
    schedule_from: int = 0  # the step from which a finished run went on
    peak_memory_bytes: int = 0

    def add(self, event: StepEvent) -> None:
        """Add one step."""
        self.real_tokens += event.real_tokens
        self.trained_tokens += event.trained_tokens
        self.computed_tokens += event.computed_tokens
        self.loss_sum += event.loss
        self.final_loss = event.loss
        self.peak_memory_bytes = max(self.peak_memory_bytes, event.peak_memory_bytes)
