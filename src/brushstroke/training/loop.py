"""`train`: the loop, flat, over the verbs of `Training`.

What a step computes is in `session` and `forward`, what is written in `folder`.
"""

import platform
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from brushstroke.adapter import Adapter, Card, LoraConfig
from brushstroke.base import Base
from brushstroke.data import EncodedData
from brushstroke.errors import AdapterFileError, ConfigError, NonFiniteError, OutputError, ResumeError
from brushstroke.files import file_sum
from brushstroke.formats import ADAPTER_FILES, load
from brushstroke.formats import save as save_adapter
from brushstroke.packed.cross_entropy import LossFunction
from brushstroke.packed.memory import peak_memory
from brushstroke.training.checkpoint import load_session, save_session
from brushstroke.training.config import TrainConfig
from brushstroke.training.folder import RunFolder, refuse_base
from brushstroke.training.identity import identify, refuse_other_run
from brushstroke.training.interrupt import Interrupts
from brushstroke.training.plan import Plan, make_plan, warn_of
from brushstroke.training.run_files import EVALUATIONS, METRICS
from brushstroke.training.sampler import BatchSampler
from brushstroke.training.schedule import factor
from brushstroke.training.session import Training
from brushstroke.training.setup import check_lora, make_chat, open_session, read_data

MAX_STEPS = 2**53  # that a float counts one by one


@dataclass(frozen=True)
class StepEvent:
    """One optimiser step, as it is written to `metrics.jsonl`.

    Args:
        step: counted from 1, of `steps` in the run.
        loss: per trained token, in nats.
        real_tokens, trained_tokens, computed_tokens: of this step.
        seconds: of this step, wall time.
        learning_rate: that this step used.
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
    """One evaluation, as it is written to `eval.jsonl`; `best` where no earlier one had a lower loss."""

    step: int
    loss: float
    trained_tokens: int
    seconds: float
    best: bool


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        adapter: the value that it made.
        summary: the totals, settings and versions that stand in `run.json`.
        resumed_from: the step of the checkpoint that the run went on from; 0 where it began anew.
    """

    adapter: Adapter
    summary: dict[str, Any]
    resumed_from: int = 0


@dataclass
class _Totals:
    """What a run adds up; kept in its checkpoints."""

    real_tokens: int = 0
    trained_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    final_loss: float = float("nan")
    best_loss: float = float("inf")
    best_step: int = 0
    best_sums: dict[str, str] = field(default_factory=dict)  # of the files of that step's adapter
    evaluated: int = 0
    peak_memory_bytes: int = 0

    def add(self, event: StepEvent) -> None:
        self.real_tokens += event.real_tokens
        self.trained_tokens += event.trained_tokens
        self.computed_tokens += event.computed_tokens
        self.loss_sum += event.loss
        self.final_loss = event.loss
        self.peak_memory_bytes = max(self.peak_memory_bytes, event.peak_memory_bytes)


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
) -> TrainResult:
    """Train an adapter on a frozen base; the base is bit for bit as before afterwards.

    Args:
        base: from `load_base`, or Base(model, tokenizer) of your own.
        data: a path, a hub data set, a list of dicts, a `datasets.Dataset`, or tokenised examples.
        lora: what the adapter should be; not with `start`.
        config: how to train.
        out: folder for the adapter, metrics, evaluations and checkpoints; without it nothing is written.
        eval_data: examples to evaluate on.
        start: an adapter to go on from.
        loss: in place of cross-entropy; see `Training.forward_backward`.
        resume: go on from the last checkpoint in `out`; start over where there is none.
        overwrite: replace an earlier run in `out`.
        prompt_column, completion_column: other names for "prompt" and "completion".
        allow_different_base: go on from an adapter although it belongs to another base.
        on_plan: told the plan and the step resumed from, before the first step. Without it the plan's
            warnings are given as a `PlanWarning`.
        on_step: told of every optimiser step.
        on_eval: told of every evaluation.

    Raises:
        ConfigError, TargetError, DataError, BaseMismatchError: the request cannot work; nothing was written.
        OutputError: `out` holds files already, cannot be written, or another run is writing it.
        ResumeError: the checkpoint belongs to other settings or other data.
        NonFiniteError: the loss is not a finite number; checkpoints from before are kept.
        KeyboardInterrupt: after a checkpoint was saved, which it names; without words where no step was done.
    """
    config = config or TrainConfig()
    if eval_data is None and (config.keep_best or config.eval_every is not None):
        asked = "keep_best" if config.keep_best else "eval_every"
        raise ConfigError(f"{asked} needs data to evaluate on; give eval_data")
    check_lora(lora)
    if out is not None:
        refuse_base(out, base.name)
    folder = RunFolder(out, resume=resume, overwrite=overwrite) if out is not None else None
    chat = make_chat(base, config, start, folder.date() if folder else None)
    examples = read_data(base, data, config, chat, prompt_column, completion_column)
    held_out = (
        read_data(base, eval_data, config, chat, prompt_column, completion_column)
        if eval_data is not None
        else None
    )

    with (
        Interrupts() as interrupts,
        folder or nullcontext(),
        open_session(base, lora, config, start, allow_different_base, chat) as session,
    ):
        columns = (prompt_column, completion_column)
        date = chat.date if chat else None
        identity = identify(session, config, lora, start, examples, held_out, columns, loss, date)
        if folder and folder.resuming and not folder.complete:
            folder.claim()
        if folder and folder.resuming and folder.complete:
            return _finished_already(folder, identity)
        totals = _Totals()
        if folder and (last := folder.last_state()):
            checkpoint, state = last
            refuse_other_run(identity, state["extra"]["identity"], checkpoint)
            totals = _Totals(**load_session(session, checkpoint)["totals"])
        resumed_from = session.steps
        order = BatchSampler(examples, config.batch_size, config.seed)
        steps = _steps(order, config)
        best: Adapter | None = None
        if folder and resumed_from and totals.best_step and config.keep_best:
            best = _load_best(folder, totals)
        plan = make_plan(session, examples, config)
        if on_plan:
            on_plan(plan, resumed_from)
        else:
            warn_of(plan)
        if folder and resumed_from:
            folder.open(resumed_from, totals.evaluated)

        def due(step: int) -> bool:
            return step == steps or step % (config.eval_every or order.steps_per_epoch) == 0

        def keep_state() -> None:
            _refuse_broken(session.parameters, session, config)
            if folder and folder.claimed and session.steps:
                extra = {"identity": identity, "totals": asdict(totals)}
                save_session(session, folder.checkpoint(session.steps), extra)
                folder.prune(totals.best_step)

        seconds_before, started = totals.seconds, time.perf_counter()
        try:
            while True:
                if held_out is not None and totals.evaluated < session.steps and due(session.steps):
                    evaluation = _evaluate(session, held_out, totals.best_loss)
                    with interrupts.held():
                        totals.evaluated = session.steps
                        if evaluation.best:
                            totals.best_loss = evaluation.loss
                            best = session.adapter() if config.keep_best else None
                            totals.best_step = session.steps
                            if folder and best:
                                saved = save_adapter(best, folder.best(totals.best_step), overwrite=True)
                                totals.best_sums = _sums(saved)
                        if folder:
                            folder.record(EVALUATIONS, asdict(evaluation))
                    if on_eval:
                        on_eval(evaluation)
                if session.steps and session.steps % config.checkpoint_every == 0 and session.steps < steps:
                    with interrupts.held():
                        keep_state()
                if session.steps >= steps:
                    break
                began = time.perf_counter()
                result = session.forward_backward(order.batch(session.steps), loss)
                rate = session.learning_rate * factor(config.schedule, session.steps, steps, config.warmup)
                with interrupts.held():
                    session.optim_step(rate)
                    now = time.perf_counter()
                    event = StepEvent(
                        step=session.steps,
                        steps=steps,
                        loss=result.loss,
                        real_tokens=result.real_tokens,
                        trained_tokens=result.trained_tokens,
                        computed_tokens=result.computed_tokens,
                        seconds=now - began,
                        learning_rate=rate,
                        peak_memory_bytes=peak_memory(session.device),
                    )
                    totals.add(event)
                    totals.seconds = seconds_before + now - started
                    if folder:
                        if session.steps == 1:
                            folder.claim()
                            folder.open(0)
                        folder.record(METRICS, _without(asdict(event), "steps"))
                if on_step:
                    on_step(event)
            adapter = best if config.keep_best and best is not None else session.adapter()
            _refuse_broken(
                (t for update in adapter.values() for t in update.tensors().values()), session, config
            )
            summary = _summary(session, totals, identity, examples)
            adapter = adapter.with_card(_card(adapter, summary, examples))
            if folder:
                with interrupts.held():
                    try:
                        folder.finish(adapter, summary)
                    except OutputError:
                        with suppress(OutputError):
                            keep_state()
                        raise
        except KeyboardInterrupt:
            session.discard()
            keep_state()
            if folder and folder.claimed and session.steps:
                kept = folder.checkpoint(session.steps)
                raise KeyboardInterrupt(f"interrupted; checkpoint saved at {kept}") from None
            raise
        return TrainResult(adapter, summary, resumed_from)


def _steps(order: BatchSampler, config: TrainConfig) -> int:
    with suppress(OverflowError):
        steps = order.steps(config.epochs, config.max_steps)
        if steps <= MAX_STEPS:
            return steps
    name = "epochs" if config.max_steps is None else "max_steps"
    raise ConfigError(f"{name} asks for more than {MAX_STEPS:.0e} optimiser steps; give fewer")


def _refuse_broken(factors: Iterable[torch.Tensor], session: Training, config: TrainConfig) -> None:
    if all(bool(torch.isfinite(factor).all()) for factor in factors):
        return
    decay = f" or the weight decay (it is {config.weight_decay:g})" if config.weight_decay else ""
    raise NonFiniteError(
        f"the factors are not finite numbers after step {session.steps}; lower the learning rate "
        f"(it is {session.learning_rate:g}){decay}, and start over with overwrite (--overwrite)"
    )


def _load_best(folder: RunFolder, totals: _Totals) -> Adapter:
    where = folder.best(totals.best_step)
    try:
        best = load(where)
        if _sums(where) != totals.best_sums:
            raise AdapterFileError(f"{where} is not as it was written")
        return best
    except AdapterFileError as error:
        raise ResumeError(
            f"{folder.checkpoints()[-1]} needs the best adapter until then, but {error}; remove that "
            "checkpoint to go on from an earlier one, or start over with overwrite (--overwrite)"
        ) from error


def _sums(adapter: Path) -> dict[str, str]:
    return {name: file_sum(adapter / name) for name in ADAPTER_FILES if (adapter / name).is_file()}


def _evaluate(session: Training, held_out: EncodedData, best_loss: float) -> EvalEvent:
    began = time.perf_counter()
    result = session.loss(held_out.examples)
    return EvalEvent(
        session.steps,
        result.loss,
        result.trained_tokens,
        time.perf_counter() - began,
        result.loss < best_loss,
    )


def _finished_already(folder: RunFolder, identity: dict[str, Any]) -> TrainResult:
    summary = folder.summary()
    refuse_other_run(identity, summary["settings"], folder.path)
    folder.clean()
    return TrainResult(load(folder.path), summary, summary["steps"])


def _summary(
    session: Training, totals: _Totals, identity: dict[str, Any], examples: EncodedData
) -> dict[str, Any]:
    kept = _without(asdict(totals), "loss_sum", "best_loss", "best_step", "best_sums", "evaluated")
    return {
        **kept,
        "steps": session.steps,
        "real_tokens_per_second": totals.real_tokens / totals.seconds if totals.seconds else 0.0,
        "mean_loss": totals.loss_sum / max(1, session.steps),
        "best_eval_loss": totals.best_loss if totals.best_loss < float("inf") else None,
        "dtype": identity["dtype"],
        "date": identity["date"],
        "learning_rate": session.learning_rate,
        "micro_tokens": session.micro_tokens,
        "memory": session.step.mode,
        "layout": session.step.forward_reason,
        "base": session.base.name,
        "examples": len(examples),
        "data_hash": examples.hash,
        "settings": identity,
        "versions": versions(),
    }


def _card(adapter: Adapter, summary: dict[str, Any], examples: EncodedData) -> Card:
    told = (
        "steps",
        "real_tokens",
        "trained_tokens",
        "final_loss",
        "mean_loss",
        "learning_rate",
        "dtype",
        "date",
        "examples",
    )
    training = {name: summary[name] for name in (*told, "data_hash", "versions")}
    card = adapter.card or Card()
    stops = tuple(dict.fromkeys((*card.stop_tokens, *examples.report.stop_tokens)))
    return card.with_changes(training=training, stop_tokens=stops)


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("brushstroke")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "brushstroke": own,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}
