"""`train`: the training loop, built on the methods of `Training`.

It computes no step itself (`session` and `packed` do) and writes no files itself (`folder` does).
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base, require_base
from brushstroke.checks import refuse_evaluation
from brushstroke.data import EncodedData, hold_out, read_rows
from brushstroke.errors import ConfigError, NonFiniteError, ResumeError
from brushstroke.formats import load, require_savable
from brushstroke.packed import LossFunction
from brushstroke.packed.memory import peak_memory
from brushstroke.training.checkpoint import load_session
from brushstroke.training.config import TrainConfig
from brushstroke.training.events import EvalEvent, StepEvent, Totals
from brushstroke.training.folder import RunFolder, refuse_base
from brushstroke.training.identity import identify, is_longer, refuse_other_run, with_length_of
from brushstroke.training.interrupt import DeferredInterrupts
from brushstroke.training.no_folder import NoFolder
from brushstroke.training.plan import Plan, make_plan, warn_of
from brushstroke.training.progress import Bar, step_bar
from brushstroke.training.run_files import EVALUATIONS, METRICS
from brushstroke.training.sampler import BatchSampler
from brushstroke.training.schedule import factor
from brushstroke.training.session import Training
from brushstroke.training.setup import RunRequest, make_chat, open_session, read_data
from brushstroke.training.summary import card_of_run, summarise
from brushstroke.training.tracking import Tracking, find_tracker, tracked

MAX_STEPS = 2**53  # a float represents every integer up to here


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        adapter: the trained adapter.
        summary: the totals, settings and versions, as in `run.json`.
        resumed_from: the step of the checkpoint from which the run continued; 0 for a new run.
    """

    adapter: Adapter
    summary: dict[str, Any]
    resumed_from: int = 0


def train(
    base: Base,
    data: Any,
    lora: LoraConfig | None = None,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    eval_data: Any = None,
    start: Adapter | None = None,
    loss: LossFunction | None = None,
    resume: bool = False,
    overwrite: bool = False,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    allow_different_base: bool = False,
    on_plan: Callable[[Plan, int], None] | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    on_eval: Callable[[EvalEvent], None] | None = None,
    track: str | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train an adapter on a frozen base; afterwards the base is bit for bit the same as before.

    Args:
        base: from `load_base`, or your own Base(model, tokenizer).
        data: a path, a hub data set, a list of dicts, a `datasets.Dataset`, or tokenised examples.
        lora: rank, scale, targets and dropout of the adapter; with `start`, only dropout may be set.
        config: the settings of the training.
        out: folder for the adapter, metrics, evaluations and checkpoints; without it nothing is written.
        eval_data: examples for the evaluations, or the share of the rows to hold out for them.
        start: an existing adapter whose training continues.
        loss: replaces cross-entropy; see `Training.forward_backward`.
        resume: continue from the last checkpoint in `out`; start a new run if there is none. A finished run
            goes on if `config` asks for more steps than it has: a constant learning rate stays as it is,
            others decay again over the added steps.
        overwrite: replace an earlier run in `out`.
        prompt_column, completion_column: other names for "prompt" and "completion".
        allow_different_base: accept a start adapter that belongs to another base.
        on_plan: called before the first step with the plan and the step from which the run resumes. Without
            it, the plan's warnings are issued as a `PlanWarning`.
        on_step: called after every optimiser step.
        on_eval: called after every evaluation.
        track: sends losses and settings to a tracker of accelerate, such as "tensorboard" or "wandb"; those
            that write files do so in `logs` in `out`.
        progress: whether to show a bar on stderr; by default if it is a terminal, and in notebooks.

    Raises:
        ConfigError, TargetError, DataError, BaseMismatchError: invalid arguments; nothing was written.
        OutputError: `out` is not empty or cannot be written, or another run is writing to it.
        AdapterFileError: the files of an adapter cannot hold this type of update; nothing was written.
        ResumeError: the checkpoint belongs to other settings or other data.
        NonFiniteError: the loss is non-finite; earlier checkpoints are kept.
        KeyboardInterrupt: after a checkpoint was saved; its message names the checkpoint, and is empty if no
            step was done.
    """
    tracker = find_tracker(track, out)
    request = RunRequest(
        config or TrainConfig(), lora, start, loss, prompt_column, completion_column, allow_different_base
    )
    require_base(base)
    if eval_data is None:
        refuse_evaluation(request.config.keep_best, request.config.eval_every, request.config.patience)
    if isinstance(eval_data, float):
        rows = read_rows(data, prompt=prompt_column, completion=completion_column)
        data, eval_data = hold_out(rows, eval_data, request.config.seed)
    if out is not None:
        refuse_base(out, base.name)
    folder = NoFolder() if out is None else RunFolder(out, resume=resume, overwrite=overwrite)
    chat = make_chat(base, request, folder.date())
    examples = read_data(base, data, request, chat)
    held_out = None if eval_data is None else read_data(base, eval_data, request, chat)

    with (
        DeferredInterrupts() as interrupts,
        folder,
        open_session(base, request, chat) as session,
    ):
        identity = identify(session, request, chat.date if chat else None, examples, held_out)
        run = _Run(session, request, folder, interrupts, examples, held_out, identity)
        finished = folder.summary() if folder.resuming and folder.complete else None
        if finished and not is_longer(identity, run.steps, finished):
            return _finished_already(folder, identity, finished)
        if out is not None:
            require_savable(session.attachment.adapter())
        resumed_from = run.resume(finished)
        plan = make_plan(session, examples, request.config)
        if run.totals.schedule_from:
            plan = replace(plan, notes=(*plan.notes, run.going_on))
        if on_plan:
            on_plan(plan, resumed_from)
        else:
            warn_of(plan)
        run.begin()
        try:
            with (
                step_bar(run.steps, resumed_from, progress) as bar,
                tracked(tracker, identity, resumed_from) as tracking,
            ):
                told = _Told(on_step, on_eval, bar, tracking)
                run.evaluate_start(told.evaluation)
                run.evaluate_if_due(told.evaluation)  # an interrupt may have come between step and evaluation
                while session.steps < run.steps and not run.lost_patience:
                    told.step(run.step())
                    run.evaluate_if_due(told.evaluation)
                    run.checkpoint_if_due()
            return TrainResult(*run.finish(), resumed_from)
        except KeyboardInterrupt:
            session.zero_grad()
            if kept := run.save_checkpoint():
                raise KeyboardInterrupt(f"interrupted; checkpoint saved at {kept}") from None
            raise


@dataclass(frozen=True)
class _Told:
    """Whom a run tells about its events: the bar, the tracker, and the caller's functions."""

    on_step: Callable[[StepEvent], None] | None
    on_eval: Callable[[EvalEvent], None] | None
    bar: Bar
    tracking: Tracking | None

    def step(self, event: StepEvent) -> None:
        self.bar.step(event)
        if self.tracking:
            self.tracking.step(event)
        if self.on_step:
            self.on_step(event)

    def evaluation(self, event: EvalEvent) -> None:
        self.bar.evaluation(event)
        if self.tracking:
            self.tracking.evaluation(event)
        if self.on_eval:
            self.on_eval(event)


class _Run:
    """The state of a run: its session, its folder, its totals and the best adapter so far."""

    def __init__(
        self,
        session: Training,
        request: RunRequest,
        folder: RunFolder,
        interrupts: DeferredInterrupts,
        examples: EncodedData,
        held_out: EncodedData | None,
        identity: dict[str, Any],
    ) -> None:
        self._session, self._folder, self._interrupts = session, folder, interrupts
        self._config, self._loss = request.config, request.loss
        self._examples, self._held_out, self._identity = examples, held_out, identity
        self._batches = BatchSampler(examples, self._config.batch_size, self._config.seed)
        self._best: Adapter | None = None
        self._start: EvalEvent | None = None
        self._began = 0.0
        self.steps = _count_steps(self._batches, self._config)
        self.totals = Totals()

    def resume(self, finished: dict[str, Any] | None = None) -> int:
        """Load the last checkpoint of the folder and return its step; 0 if there is none.

        Args:
            finished: the summary of a finished run that is to go on.
        """
        if self._folder.resuming:
            self._folder.claim()
        last = self._folder.last_state()
        if finished and (last is None or last[1]["steps"] != finished["steps"]):
            raise ResumeError(
                f"{self._folder.path} has no checkpoint of its last step {finished['steps']}, so the run "
                "cannot go on with its optimiser; start another run from its adapter (start=, --from)"
            )
        if last:
            checkpoint, state = last
            then = state["extra"]["identity"]
            then = with_length_of(then, self._identity) if finished else then
            refuse_other_run(self._identity, then, checkpoint)
            totals = self.totals = Totals(**load_session(self._session, checkpoint)["totals"])
            if finished:
                totals.schedule_from, totals.not_better = self._session.steps, 0
            if totals.best_step and self._config.keep_best:
                self._best = self._folder.load_best(totals.best_step, totals.best_sums)
            if finished:
                self.save_checkpoint()  # it has the new number of steps, so the longer run can be resumed too
        return self._session.steps

    @property
    def going_on(self) -> str:
        """How a finished run goes on."""
        done, config = self.totals.schedule_from, self._config
        rate = (
            "the learning rate stays constant"
            if config.schedule == "constant"
            else f"the {config.schedule} learning rate decays again over the added {self.steps - done} steps"
        )
        return f"the finished run goes on from step {done} to step {self.steps}; {rate}"

    def begin(self) -> None:
        """Remove the lines of steps after the checkpoint from the folder, and start the clock."""
        if self._session.steps:
            self._folder.open(self._session.steps, self.totals.evaluated)
        self._began = time.perf_counter() - self.totals.seconds

    def step(self) -> StepEvent:
        """Run one optimiser step and record it in the folder."""
        session = self._session
        began = time.perf_counter()
        result = session.forward_backward(self._batches.batch(session.steps), self._loss)
        rate = session.learning_rate * self._factor()
        with self._interrupts.deferred():
            session.optim_step(rate)
            now = time.perf_counter()
            event = StepEvent(
                step=session.steps,
                steps=self.steps,
                loss=result.loss,
                real_tokens=result.real_tokens,
                trained_tokens=result.trained_tokens,
                computed_tokens=result.computed_tokens,
                seconds=now - began,
                learning_rate=rate,
                peak_memory_bytes=peak_memory(session.device),
            )
            self.totals.add(event)
            self.totals.seconds = now - self._began
            if session.steps == 1:
                self._folder.claim()
                self._folder.open(0)
                if self._start is not None:
                    self._folder.record(EVALUATIONS, asdict(self._start))
            self._folder.record(METRICS, {k: v for k, v in asdict(event).items() if k != "steps"})
        return event

    def _factor(self) -> float:
        """What the schedule multiplies the learning rate with in the next step."""
        config, step, since = self._config, self._session.steps, self.totals.schedule_from
        if not since:
            return factor(config.schedule, step, self.steps, config.warmup)
        if config.schedule == "constant":  # a share of the finished run as warm-up is over
            return factor(config.schedule, step, self.steps, config.warmup if config.warmup >= 1 else 0.0)
        return factor(config.schedule, step - since, self.steps - since)

    def evaluate_start(self, on_eval: Callable[[EvalEvent], None]) -> None:
        """Evaluate before the first step; the folder gets the result with the first step."""
        if self._held_out is None or self._session.steps:
            return
        self._start = _evaluate(self._session, self._held_out, -math.inf)
        self.totals.eval_loss_before = self._start.loss
        on_eval(self._start)

    def evaluate_if_due(self, on_eval: Callable[[EvalEvent], None]) -> None:
        """Evaluate if an evaluation is due after this step and was not done yet; keep the best adapter."""
        session, totals = self._session, self.totals
        due = session.steps == self.steps or session.steps % self._steps_between_evaluations == 0
        if self._held_out is None or not due or totals.evaluated >= session.steps:
            return
        evaluation = _evaluate(session, self._held_out, totals.best_loss)
        with self._interrupts.deferred():
            totals.evaluated, totals.eval_loss = session.steps, evaluation.loss
            totals.not_better = 0 if evaluation.best else totals.not_better + 1
            if evaluation.best:
                totals.best_loss, totals.best_step = evaluation.loss, session.steps
                if self._config.keep_best:
                    self._best = session.adapter()
                    totals.best_sums = self._folder.save_best(self._best, session.steps)
            self._folder.record(EVALUATIONS, asdict(evaluation))
        on_eval(evaluation)

    @property
    def lost_patience(self) -> bool:
        """Whether the last evaluations, as many as the patience, were all no better than an earlier one."""
        return self._config.patience is not None and self.totals.not_better >= self._config.patience

    @property
    def _steps_between_evaluations(self) -> int:
        return self._config.eval_every or self._batches.steps_per_epoch

    def checkpoint_if_due(self) -> None:
        """Save a checkpoint if one is due after this step; the last step writes the adapter instead."""
        steps = self._session.steps
        if steps % self._config.checkpoint_every == 0 and steps < self.steps:
            with self._interrupts.deferred():
                self.save_checkpoint()

    def save_checkpoint(self) -> Path | None:
        """Save the state of the run; returns the path, or None without a folder or before the first step."""
        self._require_finite(self._session.parameters)
        extra = {"identity": self._identity, "totals": asdict(self.totals)}
        return self._folder.save_checkpoint(self._session, extra, self.totals.best_step)

    def finish(self) -> tuple[Adapter, dict[str, Any]]:
        """Return the adapter and the summary of the run, and write both."""
        adapter = self._session.adapter() if self._best is None else self._best
        self._require_finite(tensor for update in adapter.values() for tensor in update.tensors().values())
        summary = summarise(self._session, self.totals, self._identity, self._examples)
        summary["stopped_early"] = self._session.steps < self.steps
        adapter = adapter.with_card(card_of_run(adapter, summary, self._examples))
        with self._interrupts.deferred():
            self.save_checkpoint()  # from which this run or a longer one can go on
            self._folder.finish(adapter, summary)
        return adapter, summary

    def _require_finite(self, factors: Iterable[torch.Tensor]) -> None:
        if all(bool(torch.isfinite(factor).all()) for factor in factors):
            return
        decay = self._config.weight_decay
        also = f" or the weight decay (it is {decay:g})" if decay else ""
        raise NonFiniteError(
            f"the factors contain non-finite values after step {self._session.steps}; lower the learning "
            f"rate (it is {self._session.learning_rate:g}){also}, and start over with overwrite (--overwrite)"
        )


def _count_steps(batches: BatchSampler, config: TrainConfig) -> int:
    with suppress(OverflowError):
        steps = batches.steps(config.epochs, config.max_steps)
        if steps <= MAX_STEPS:
            return steps
    name = "epochs" if config.max_steps is None else "max_steps"
    raise ConfigError(f"{name} asks for more than {MAX_STEPS:.0e} optimiser steps; give fewer")


def _evaluate(session: Training, held_out: EncodedData, best_loss: float) -> EvalEvent:
    began = time.perf_counter()
    result = session.loss(held_out)
    seconds = time.perf_counter() - began
    return EvalEvent(session.steps, result.loss, result.trained_tokens, seconds, result.loss < best_loss)


def _finished_already(folder: RunFolder, identity: dict[str, Any], summary: dict[str, Any]) -> TrainResult:
    refuse_other_run(identity, summary["settings"], folder.path)
    folder.clean()
    return TrainResult(load(folder.path), summary, summary["steps"])
