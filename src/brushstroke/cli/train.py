"""The commands `train` and `plan`.

They check everything that needs no weights before they load the base.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from brushstroke.checks import refuse_evaluation
from brushstroke.cli.adapters import load, load_adapter
from brushstroke.cli.console import emit_json, people, results, say, size, warn
from brushstroke.cli.early import check_data, say_what_was_read
from brushstroke.cli.options import (
    RUN,
    AdapterOptions,
    DataOptions,
    RunOptions,
    TrainingOptions,
    train_config,
)
from brushstroke.cli.plan_text import print_plan
from brushstroke.cli.progress import TrainProgress, clock
from brushstroke.errors import NonFiniteError
from brushstroke.locate import require_base_files

if TYPE_CHECKING:
    from brushstroke.training.folder import RunFolder
    from brushstroke.training.plan import Plan


def train(
    base: str,
    data: list[str],
    *,
    out: Annotated[Path, Parameter(group=RUN)],
    resume: Annotated[bool, Parameter(group=RUN)] = False,
    overwrite: Annotated[bool, Parameter(group=RUN)] = False,
    adapter: AdapterOptions | None = None,
    training: TrainingOptions | None = None,
    data_options: DataOptions | None = None,
    track: Annotated[str | None, Parameter(group=RUN)] = None,
    run: RunOptions | None = None,
) -> None:
    """Train an adapter on a frozen base.

    Args:
        base: A model folder, a hub id or a .gguf file.
        data: A JSONL, JSON, CSV or Parquet file, a folder of them, a URL of a file, or a data set on the hub;
            several are joined, and NAME:2 repeats the rows of one.
        out: Folder for the adapter, its metrics and checkpoints.
        resume: Continue from the last checkpoint in --out; start from the beginning if there is none. A
            finished run goes on if --max-steps, the steps in total, is larger.
        overwrite: Replace an earlier run in --out: its adapter when the new one is complete, its other files
            with the first step. Files with other names remain.
        track: Send losses and settings to a tracker of accelerate, such as tensorboard or wandb; tensorboard
            writes to OUT/logs.
    """
    run, adapter = run or RunOptions(), adapter or AdapterOptions()
    data_options = data_options or DataOptions()
    require_base_files(base)
    request = _Request(data, adapter, training, data_options)
    from brushstroke.training.folder import RunFolder, refuse_base
    from brushstroke.training.tracking import find_tracker

    find_tracker(track, out)
    refuse_base(out, base)
    folder = RunFolder(out, resume=resume, overwrite=overwrite)
    if adapter.start is not None:
        folder.refuse_start(adapter.start)
    complete = folder.resuming and folder.complete
    if resume and not folder.resuming:
        say(f"there is no checkpoint in {out}; starting from the beginning")
    request.check_data(base, run.trust_remote_code, folder.date())
    loaded, why = _load(base, run)
    from brushstroke.training import train as run_training
    from brushstroke.training.interrupt import ignore_interrupts

    with TrainProgress() as progress:
        try:
            result = run_training(
                loaded,
                **request.arguments,
                out=out,
                eval_data=request.eval_rows,
                resume=resume,
                overwrite=overwrite,
                allow_different_base=run.allow_different_base,
                on_plan=_on_plan(progress, request, why),
                on_step=progress.step,
                on_eval=progress.evaluation,
                track=track,
                progress=False,
            )
        except KeyboardInterrupt as error:
            ignore_interrupts()
            raise KeyboardInterrupt(_interrupted(str(error), folder)) from None
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}{_kept(folder)}") from error
    if complete and result.resumed_from == result.summary["steps"]:
        say(f"the run in {out} is already complete: {result.summary['steps']} steps; nothing was done")
    else:
        _say_done(result.summary, out)
    if run.json:
        emit_json(result.summary)


def plan(
    base: str,
    data: list[str],
    *,
    adapter: AdapterOptions | None = None,
    training: TrainingOptions | None = None,
    data_options: DataOptions | None = None,
    run: RunOptions | None = None,
    out: Annotated[Path | None, Parameter(show=False)] = None,
    resume: Annotated[bool, Parameter(show=False)] = False,
    overwrite: Annotated[bool, Parameter(show=False)] = False,
    track: Annotated[str | None, Parameter(show=False)] = None,
) -> None:
    """Show what train with the same flags would do, without training.

    Args:
        base: A model folder, a hub id or a .gguf file.
        data: A JSONL, JSON, CSV or Parquet file, a folder of them, a URL of a file, or a data set on the hub;
            several are joined, and NAME:2 repeats the rows of one.
        out: As for train; nothing is written.
        resume: As for train.
        overwrite: As for train.
        track: As for train.
    """
    run, data_options = run or RunOptions(), data_options or DataOptions()
    require_base_files(base)
    request = _Request(data, adapter or AdapterOptions(), training, data_options)
    request.check_data(base, run.trust_remote_code)
    loaded, why = _load(base, run)
    from brushstroke.training import plan as make_plan

    made = make_plan(loaded, **request.arguments, allow_different_base=run.allow_different_base)
    if run.json:
        emit_json({**made.as_dict(), "dtype_reason": why})
    else:
        print_plan(results(), made, why, request.config)
    for warning in made.warnings:
        warn(warning)


class _Request:
    """The inputs of a run that need no base, read and checked."""

    def __init__(
        self, data: list[str], adapter: AdapterOptions, training: TrainingOptions | None, options: DataOptions
    ) -> None:
        if options.eval_data is None and training:
            refuse_evaluation(training.keep_best, training.eval_every, training.patience)
        from brushstroke.data import find_columns, hold_out, read_rows, read_share

        given = {"prompt": options.prompt, "completion": options.completion, "use": options.use}
        rows = read_rows(data, **given)
        self.eval_rows = None
        share = read_share(options.eval_data or "")
        if share is not None and Path(str(options.eval_data)).exists():
            say(f"--eval {options.eval_data} is a file here, and is read as one")
            share = None
        if share is not None:
            rows, self.eval_rows = hold_out(rows, share, (training and training.seed) or 0)
        elif options.eval_data is not None:
            self.eval_rows = read_rows(options.eval_data, **given)
        for read in filter(None, (rows, self.eval_rows)):
            find_columns(read, options.prompt, options.completion)
        say_what_was_read(self.eval_rows)
        lora = adapter.config()
        start = None
        if adapter.start is not None:
            start = load_adapter(adapter.start)
        self.config = train_config(training, options)
        self.arguments: dict[str, Any] = {
            "data": rows,
            "lora": lora,
            "config": self.config,
            "start": start,
            "prompt_column": options.prompt,
            "completion_column": options.completion,
        }

    def check_data(self, base: str, trust_remote_code: bool, date: str | None = None) -> None:
        """Check the data with the base's tokenizer, without loading the weights.

        Args:
            base: what `load_base` takes.
            trust_remote_code: run Python code from the base's folder.
            date: of a resumed run.
        """
        start = self.arguments["start"]
        check_data(
            base,
            (self.arguments["data"], self.eval_rows),
            prompt_column=self.arguments["prompt_column"],
            completion_column=self.arguments["completion_column"],
            max_length=self.config.max_length,
            skip_too_long=self.config.skip_too_long,
            split_turns=self.config.split_turns,
            chat_template=self.config.chat_template
            or (start.card.chat_template if start and start.card else None),
            date=self.config.date or date,
            trust_remote_code=trust_remote_code,
        )


def _load(base: str, run: RunOptions) -> tuple[Any, str]:
    """Load the base; also return the reason for its dtype."""
    from brushstroke.base import choose_device, choose_dtype

    _, why = choose_dtype(run.dtype, choose_device(run.device))
    return load(base, run), why


def _on_plan(progress: TrainProgress, request: _Request, why: str) -> "Callable[[Plan, int], None]":
    def on_plan(made: "Plan", resumed_from: int) -> None:
        print_plan(people(), made, why, request.config)
        for warning in made.warnings:
            warn(warning)
        if resumed_from:
            say(f"continuing from the checkpoint of step {resumed_from}")
        evaluations = 0
        if request.eval_rows is not None:
            every = request.config.eval_every or max(1, round(made.steps / max(made.epochs, 1e-9)))
            evaluations = -(-made.steps // every) - resumed_from // every + (not resumed_from)
        progress.start(made, resumed_from, evaluations)

    return on_plan


def _interrupted(said: str, folder: "RunFolder") -> str:
    """The message after an interrupt: what was saved, and how to continue."""
    if not said and not folder.resuming:
        return "interrupted before the first step; nothing was changed"
    return f"{said or 'interrupted before the next step'}; continue with --resume"


def _kept(folder: "RunFolder") -> str:
    kept = folder.checkpoints()
    return f"; the last good checkpoint is {kept[-1]}" if kept else ""


def _say_done(summary: dict[str, Any], out: Path) -> None:
    say(
        f"done: {summary['steps']} steps, {summary['real_tokens']:,} tokens in {clock(summary['seconds'])} "
        f"({summary['real_tokens_per_second']:,.0f} tokens/s), mean loss {summary['mean_loss']:.4f}, "
        f"last {summary['final_loss']:.4f}, peak {size(summary['peak_memory_bytes'])}"
    )
    if (before := summary.get("eval_loss_before")) is not None:
        stopped = f"; stopped early at step {summary['steps']}" if summary.get("stopped_early") else ""
        best = summary["best_eval_loss"]
        after = f"{summary['eval_loss']:.4f} after, lowest {best:.4f}"
        say(f"evaluation loss: {before:.4f} before, {after}{stopped}")
    say(f"the adapter is in {out}")
