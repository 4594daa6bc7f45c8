"""The output folder of a training run: metrics, evaluations, checkpoints, and at the end the adapter.

It trains nothing. The adapter's files appear when the run is complete, not before.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.errors import AdapterFileError, ConfigError, OutputError, ResumeError
from brushstroke.files import file_sum, read_json
from brushstroke.formats import ADAPTER_FILES, as_files, load, save
from brushstroke.formats.peft import TENSORS as WEIGHTS
from brushstroke.outputs import (
    PARTIAL,
    RunLock,
    clear_leftovers,
    output_errors,
    read_first,
    refuse_existing,
    remove_files,
    remove_own,
    write_file,
    write_files,
)
from brushstroke.training.checkpoint import OWN_FILES as STEP_FILES
from brushstroke.training.checkpoint import STATE, Resumable, damaged, read_state, save_session
from brushstroke.training.jsonl import append, lines_until
from brushstroke.training.run_files import (
    CHECKPOINTS,
    EVALUATIONS,
    METRICS,
    OWN_FILES,
    RUN,
    checkpoint_folders,
    clear_run,
    names_in,
    refuse_foreign,
    step_of,
)

KEPT = 2  # checkpoints
EXTRA = {"identity", "totals"}  # what a run keeps in its checkpoints beside the session


class RunFolder:
    """The files of one run; nothing is made on disk before the first optimiser step is recorded.

    A context manager: what `claim` claimed is free again at its end.

    Args:
        path: the folder.
        resume: go on from the last checkpoint, if there is one.
        overwrite: replace an earlier run's files; files of other names stay.

    Raises:
        ConfigError: both flags are given, or a path that no file system takes.
        OutputError: the folder holds files and neither flag is given, or a stranger's by a run's names, or
            another run is writing it.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ConfigError(
                "resume (--resume) goes on from the last checkpoint and overwrite (--overwrite) starts over "
                "in its place; give one of them"
            )
        if "\0" in str(path):
            raise ConfigError(f"the output folder {str(path)!r} has a NUL character in its name")
        self.path = Path(path).expanduser()
        self._resume, self._overwrite = resume, overwrite
        self._lock = RunLock(self.path)
        self._lock.refuse_other()
        self.resuming = self._judge()

    def refuse_start(self, start: Path) -> None:
        """Check that an adapter to go on from is not one that this run removes before it is done.

        Raises:
            ConfigError: it is the folder's own adapter, or among its checkpoints.
        """
        own, adapter = (Path(os.path.realpath(path.expanduser())) for path in (self.path, start))
        if adapter == own or own / CHECKPOINTS in adapter.parents:
            raise ConfigError(
                f"the start adapter {start} is in the output folder, where the run would replace it; choose "
                "another output folder (--out)"
            )

    def claim(self) -> None:
        """Keep other runs out until the end of the `with` block, and judge the folder again: time has passed.

        Raises:
            OutputError: another run is writing, or the folder is not what it was.
        """
        with output_errors(self.path):
            self._lock.take()
        if self._judge() != self.resuming:
            raise OutputError(
                f"another run has written {self.path} since this one began; give the command again to go on "
                "from there, or choose another folder"
            )

    @property
    def claimed(self) -> bool:
        """Whether this run may write."""
        return self._lock.held

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    @property
    def complete(self) -> bool:
        """Whether a finished adapter stands in the folder."""
        run = self.path / RUN
        return (
            (self.path / WEIGHTS).is_file()
            and run.is_file()
            and (OWN_FILES.is_own(run) or not read_first(run))
        )

    def checkpoints(self) -> list[Path]:
        """The checkpoints in order of their steps."""
        return [folder for folder in checkpoint_folders(self.path, "step") if (folder / STATE).is_file()]

    def last_state(self) -> tuple[Path, dict[str, Any]] | None:
        """The last checkpoint and its state, or None where there is none.

        Raises:
            ResumeError: it is damaged, or not of a run and a step as its name says.
        """
        found = self.checkpoints()
        if not (self.resuming and found):
            return None
        state = read_state(found[-1])
        if self.checkpoint(state["steps"]) != found[-1] or not state["extra"].keys() >= EXTRA:
            raise damaged(found[-1], f"its {STATE} is of another step, or of no run")
        return found[-1], state

    def date(self) -> str | None:
        """What the chat template took for today in the run that goes on; None where it prints no date."""
        if not self.resuming:
            return None
        found = None if self.complete else self.last_state()
        identity = found[1]["extra"]["identity"] if found else self.summary()["settings"]
        return identity.get("date")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step belongs."""
        return self.path / CHECKPOINTS / f"step-{step:08d}"

    def best(self, step: int) -> Path:
        """Where the best adapter so far is kept, if it is the one of this step."""
        return self.path / CHECKPOINTS / f"best-{step:08d}"

    def save_checkpoint(self, session: Resumable, extra: Mapping[str, Any], best_step: int) -> Path | None:
        """Write the checkpoint of the session's step and remove older ones; None where there is no step.

        Raises:
            OutputError: it cannot be written.
        """
        if not (self.claimed and session.steps):
            return None
        path = self.checkpoint(session.steps)
        save_session(session, path, extra)
        self.prune(best_step)
        return path

    def save_best(self, adapter: Adapter, step: int) -> dict[str, str]:
        """Write the best adapter so far, of this step; returns the check sums of its files.

        Raises:
            OutputError: it cannot be written.
        """
        return _sums(save(adapter, self.best(step), overwrite=True))

    def load_best(self, step: int, sums: Mapping[str, str]) -> Adapter:
        """The best adapter until the last checkpoint.

        Raises:
            ResumeError: it is missing, or not as it was written.
        """
        path = self.best(step)
        try:
            best = load(path)
            if _sums(path) != sums:
                raise AdapterFileError(f"{path} is not as it was written")
            return best
        except AdapterFileError as error:
            raise ResumeError(
                f"{self.checkpoints()[-1]} needs the best adapter until then, but {error}; remove that "
                "checkpoint to go on from an earlier one, or start over with overwrite (--overwrite)"
            ) from error

    def prune(self, best_step: int) -> None:
        """Remove all checkpoints but the last two, and what interrupted writes left.

        Of the best adapters those of this step and of the checkpoints that are kept stay: a run may go on
        from each of them.
        """
        kept = self.checkpoints()[-KEPT:]
        named = {self.best(step) for step in (best_step, *map(_best_step, kept))}
        with suppress(OSError):
            for folder in [*checkpoint_folders(self.path, "step"), *checkpoint_folders(self.path, "best")]:
                if folder not in kept and folder not in named:
                    remove_own(folder, names_in(folder))
            clear_run(self.path)

    def open(self, step: int, evaluated: int = 0) -> None:
        """Make the folder ready for the steps after this one: later lines of an interrupted run are cut off.

        Args:
            step: the last one whose line in the metrics stays.
            evaluated: the last one whose evaluation stays.

        Raises:
            ResumeError: lines that should stay are missing or damaged; nothing is changed.
            OutputError: it cannot be written.
        """
        metrics = lines_until(self.path / METRICS, step, every=True) if step else b""
        evaluations = lines_until(self.path / EVALUATIONS, evaluated) if step else b""
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            steps, best = (checkpoint_folders(self.path, kind) for kind in ("step", "best"))
            for folder in () if step else (*reversed(steps), *best):  # the metrics belong to the last step
                remove_own(folder, names_in(folder))
            with self._lock.alone():
                remove_files(self.path, (*ADAPTER_FILES, *(() if step else (EVALUATIONS, METRICS, RUN))))
            if step:
                write_file(self.path / METRICS, metrics)
                if (self.path / EVALUATIONS).exists():
                    write_file(self.path / EVALUATIONS, evaluations)
            self.clean()

    def clean(self) -> None:
        """Remove what an interrupted write left behind."""
        clear_run(self.path)

    def record(self, name: str, line: Mapping[str, Any]) -> None:
        """Append one line of JSON and flush it to the disk at once; a new file appears with its line.

        Raises:
            OutputError: it cannot be written.
        """
        append(self.path / name, line)

    def finish(self, adapter: Adapter, summary: Mapping[str, Any]) -> None:
        """Write the summary and the adapter; from now on the run is complete.

        Raises:
            OutputError: they cannot be written.
        """
        files = as_files(adapter, self.path.resolve().name)
        files[RUN] = json.dumps(summary, indent=2, default=str) + "\n"
        write_files(self.path, files, last=WEIGHTS, owned=ADAPTER_FILES)

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
            ResumeError: it cannot be read.
        """
        try:
            summary = read_json(self.path / RUN)
            return {**summary, "steps": summary["steps"], "settings": dict(summary["settings"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{self.path / RUN} cannot be read ({error}); remove it and start over with overwrite"
            ) from error

    def _judge(self) -> bool:
        """Whether there is something to go on from; refuses what must not be replaced."""
        clear_leftovers(self.path, ADAPTER_FILES.__contains__)
        with output_errors(self.path):
            clear_run(self.path)
        finished = self._resume and self.complete
        if not (self._resume or self._overwrite):
            self._refuse_run()
            refuse_existing(self.path, overwrite=False)
        if not finished:
            refuse_foreign(self.path)
        resuming = finished or (self._resume and bool(self.checkpoints()))
        if not resuming:
            refuse_existing(self.path, self._overwrite or (self._resume and self._only_of_a_run()))
        return resuming

    def _refuse_run(self) -> None:
        """Refuse a folder with a run of ours, naming what it holds and what loses nothing first."""
        states = {step_of(folder): folder / STATE for folder in self.checkpoints()}
        steps = [step for step, state in states.items() if STEP_FILES.is_own(state) or not read_first(state)]
        way = "choose another folder"
        if self.complete:
            what, lost = f"a finished run{self._finished_steps()}", "adapter, checkpoints and metrics"
        elif steps:
            what, lost = "a run that is not finished", "checkpoints and metrics"
            way = f"go on from its checkpoint of step {max(steps)} with --resume (resume=True), or {way}"
        elif OWN_FILES.is_own(self.path / METRICS):
            what, lost = "a run that stopped before its first checkpoint", "metrics"
        else:
            return
        raise OutputError(
            f"{self.path} holds {what}; {way}, or start over with --overwrite (overwrite=True), which "
            f"removes its {lost}"
        )

    def _finished_steps(self) -> str:
        with suppress(ResumeError):
            return f" of {self.summary()['steps']} steps"
        return ""

    def _only_of_a_run(self) -> bool:
        """Whether nothing but what a run leaves before it is complete is here; an adapter needs overwrite."""
        known = {METRICS, EVALUATIONS, RUN, CHECKPOINTS, *ADAPTER_FILES} - {WEIGHTS}
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return all(name in known or PARTIAL.fullmatch(name) for name in names)


def refuse_base(out: str | Path, base: str | Path | None) -> None:
    """Check that an output folder is not the folder of the base.

    Raises:
        OutputError: it is; with an adapter in it, transformers would load the two together.
    """
    out = Path(out).expanduser()
    if base and out.is_dir() and os.path.realpath(out) == os.path.realpath(os.path.expanduser(base)):
        raise OutputError(f"{out} is the base's own folder; choose another folder (--out)")


def _sums(adapter: Path) -> dict[str, str]:
    """The check sums of an adapter's files."""
    return {name: file_sum(adapter / name) for name in ADAPTER_FILES if (adapter / name).is_file()}


def _best_step(checkpoint: Path) -> int:
    """The step of the best adapter that a checkpoint names; 0 where it names none."""
    with suppress(ResumeError, KeyError, TypeError):
        return int(read_state(checkpoint)["extra"]["totals"]["best_step"])
    return 0
