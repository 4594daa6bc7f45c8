"""The output folder of a training run: metrics, evaluations, checkpoints, and at the end the adapter.

It trains nothing. The adapter's files are written only when the run is complete; until then, those of an
earlier run stay.
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
    RunLock,
    clear_leftovers,
    clear_leftovers_in,
    output_errors,
    read_first,
    refuse_existing,
    remove_files,
    remove_own,
    replace_files,
    write_file,
)
from brushstroke.study_folder import refuse_inside
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
# the names that a run may leave without a finished adapter
OF_A_RUN = {METRICS, EVALUATIONS, RUN, CHECKPOINTS, *ADAPTER_FILES} - {WEIGHTS}
EXTRA = {"identity", "totals"}  # what a run stores in its checkpoints in addition to the session


class RunFolder:
    """The files of one run; nothing is written to disk before the first optimiser step is recorded.

    A context manager: on exit it releases the lock that `claim` took.

    Args:
        path: the folder.
        resume: continue from the last checkpoint, if there is one.
        overwrite: replace an earlier run's files; files with other names stay, and so does an adapter until
            the new one is complete.

    Raises:
        ConfigError: both flags are given, or the path is invalid.
        OutputError: the folder is not empty and neither flag is given, or another program wrote files with
            the names of a run's files, or another run is writing to the folder, or a study.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ConfigError(
                "resume (--resume) continues from the last checkpoint, overwrite (--overwrite) starts over; "
                "give one of them"
            )
        if "\0" in str(path):
            raise ConfigError(f"the output folder {str(path)!r} has a NUL character in its name")
        self.path = Path(path).expanduser()
        refuse_inside(self.path)
        self._resume, self._overwrite = resume, overwrite
        self._lock = RunLock(self.path)
        with output_errors(self.path):
            self._lock.refuse_other()
        self.resuming = self._check()

    def refuse_start(self, start: Path) -> None:
        """Check that the start adapter is not one that this run would remove.

        Raises:
            ConfigError: it is the folder's own adapter, or one of its checkpoints.
        """
        own, adapter = (Path(os.path.realpath(path.expanduser())) for path in (self.path, start))
        if adapter == own or own / CHECKPOINTS in adapter.parents:
            raise ConfigError(
                f"the start adapter {start} is in the output folder, where the run would replace it; choose "
                "another output folder (--out)"
            )

    def claim(self) -> None:
        """Lock the folder against other runs until the end of the `with` block, and check it again.

        Raises:
            OutputError: another run is writing to the folder, or has changed it since the first check.
        """
        with output_errors(self.path):
            self._lock.take()
        if self._check() != self.resuming:
            raise OutputError(
                f"another run has written to {self.path} since this one began; repeat the command to "
                "continue from there, or choose another folder"
            )

    @property
    def claimed(self) -> bool:
        """Whether this run has locked the folder and may write."""
        return self._lock.is_locked

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    @property
    def complete(self) -> bool:
        """Whether the folder contains a finished adapter."""
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
        """The last checkpoint and its state, or None if there is none or the run does not resume.

        Raises:
            ResumeError: it is damaged, was not written by a run, or is of another step than its name says.
        """
        found = self.checkpoints()
        if not (self.resuming and found):
            return None
        state = read_state(found[-1])
        if self.checkpoint(state["steps"]) != found[-1] or not state["extra"].keys() >= EXTRA:
            raise damaged(found[-1], f"its {STATE} belongs to another step, or was not written by a run")
        return found[-1], state

    def date(self) -> str | None:
        """Today's date for the chat template in the resumed run; None if the template prints no date."""
        if not self.resuming:
            return None
        found = None if self.complete else self.last_state()
        identity = found[1]["extra"]["identity"] if found else self.summary()["settings"]
        return identity.get("date")

    def checkpoint(self, step: int) -> Path:
        """The folder for the checkpoint of a step."""
        return self.path / CHECKPOINTS / f"step-{step:08d}"

    def best(self, step: int) -> Path:
        """The folder for the best adapter so far, if it is from this step."""
        return self.path / CHECKPOINTS / f"best-{step:08d}"

    def save_checkpoint(self, session: Resumable, extra: Mapping[str, Any], best_step: int) -> Path | None:
        """Write the checkpoint of the session's step and remove older ones; None if there is no step yet.

        Raises:
            OutputError: it cannot be written.
        """
        if not (self.claimed and session.steps):
            return None
        self._lock.require_place()
        path = self.checkpoint(session.steps)
        save_session(session, path, extra)
        self.prune(best_step)
        return path

    def save_best(self, adapter: Adapter, step: int) -> dict[str, str]:
        """Write the best adapter so far, from this step; returns the checksums of its files.

        Raises:
            OutputError: it cannot be written.
        """
        self._lock.require_place()
        return _sums(save(adapter, self.best(step), overwrite=True))

    def load_best(self, step: int, sums: Mapping[str, str]) -> Adapter:
        """The best adapter up to the last checkpoint.

        Raises:
            ResumeError: it is missing, or its checksums do not match.
        """
        path = self.best(step)
        try:
            best = load(path)
            if _sums(path) == sums:
                return best
            reason = f"the checksums of {path} do not match"
        except AdapterFileError as error:
            reason = str(error)
        raise ResumeError(
            f"{self.checkpoints()[-1]} needs the best adapter up to its step, but {reason}; remove that "
            "checkpoint to continue from an earlier one, or start over with overwrite (--overwrite)"
        )

    def prune(self, best_step: int) -> None:
        """Remove all checkpoints except the last two, and temporary files of interrupted writes.

        The best adapters of this step and of the remaining checkpoints are kept: a run may resume from each
        of these checkpoints.
        """
        kept = self.checkpoints()[-KEPT:]
        named = {self.best(step) for step in (best_step, *map(_best_step, kept))}
        with suppress(OSError):
            for folder in [*checkpoint_folders(self.path, "step"), *checkpoint_folders(self.path, "best")]:
                if folder not in kept and folder not in named:
                    remove_own(folder, names_in(folder))
            clear_run(self.path)

    def open(self, step: int, evaluated: int = 0) -> None:
        """Prepare the folder for the steps after `step`: remove later lines of an interrupted run.

        For a new run, the metrics of an earlier run stay until the first line of the new ones replaces them:
        without `run.json`, they show that the adapter in the folder is not the result of a run.

        Args:
            step: the last step whose line in the metrics is kept.
            evaluated: the last step whose evaluation is kept.

        Raises:
            ResumeError: lines that should be kept are missing or damaged; nothing is changed.
            OutputError: it cannot be written.
        """
        self._lock.require_place()
        metrics = lines_until(self.path / METRICS, step, every=True) if step else b""
        evaluations = lines_until(self.path / EVALUATIONS, evaluated) if step else b""
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            steps, best = (checkpoint_folders(self.path, kind) for kind in ("step", "best"))
            for folder in () if step else (*reversed(steps), *best):  # the metrics belong to the last step
                remove_own(folder, names_in(folder))
            remove_files(self.path, (RUN,) if step else (EVALUATIONS, RUN))
            if step:
                write_file(self.path / METRICS, metrics)
                if (self.path / EVALUATIONS).exists():
                    write_file(self.path / EVALUATIONS, evaluations)
            self.clean()

    def clean(self) -> None:
        """Remove temporary files of interrupted writes."""
        clear_run(self.path)

    def record(self, name: str, line: Mapping[str, Any]) -> None:
        """Append one line of JSON and flush it to the disk; the metrics of step 1 begin a new file.

        Raises:
            OutputError: it cannot be written.
        """
        self._lock.require_place()
        append(self.path / name, line, first=name == METRICS and line["step"] == 1)

    def finish(self, adapter: Adapter, summary: Mapping[str, Any]) -> None:
        """Write the summary and the adapter, in one step over an earlier one; then the run is complete.

        Raises:
            OutputError: they cannot be written.
        """
        self._lock.require_place()
        clear_leftovers(self.path, ADAPTER_FILES.__contains__)
        files = as_files(adapter, self.path.resolve().name)
        files[RUN] = json.dumps(summary, indent=2, default=str) + "\n"
        replace_files(self.path, files, last=WEIGHTS, owned=ADAPTER_FILES)

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

    def _check(self) -> bool:
        """Whether there is a run to resume; refuses a folder that must not be overwritten."""
        path = self.path.resolve()
        clear_leftovers_in(path.parent, path.name.__eq__, ADAPTER_FILES.__contains__)
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
            refuse_existing(self.path, self._overwrite or self._unfinished, ignoring=OF_A_RUN)
        return resuming

    def _refuse_run(self) -> None:
        """Refuse a folder with an earlier run; the message first offers the options that lose nothing."""
        states = {step_of(folder): folder / STATE for folder in self.checkpoints()}
        steps = [step for step, state in states.items() if STEP_FILES.is_own(state) or not read_first(state)]
        advice = "choose another folder"
        if self.complete:
            what, lost = f"a finished run{self._finished_steps()}", "adapter, checkpoints and metrics"
            advice = f"go on with --resume and a larger --max-steps (resume=True), or {advice}"
        elif steps:
            what, lost = "an unfinished run", "checkpoints and metrics"
            advice = (
                f"continue from its checkpoint of step {max(steps)} with --resume (resume=True), or {advice}"
            )
        elif OWN_FILES.is_own(self.path / METRICS):
            what, lost = "a run that stopped before its first checkpoint", "metrics"
        else:
            return
        if not self.complete and (self.path / WEIGHTS).exists():
            lost += " and, at the end, replaces the adapter there"
        raise OutputError(
            f"{self.path} holds {what}; {advice}, or start over with --overwrite (overwrite=True), which "
            f"removes its {lost}"
        )

    def _finished_steps(self) -> str:
        with suppress(ResumeError):
            return f" of {self.summary()['steps']} steps"
        return ""

    @property
    def _unfinished(self) -> bool:
        """Whether a run began to write here and has not finished; an adapter there is not its result."""
        return OWN_FILES.is_own(self.path / METRICS) and not (self.path / RUN).exists()


def refuse_base(out: str | Path, base: str | Path | None) -> None:
    """Check that an output folder is not the folder of the base.

    Raises:
        OutputError: it is; transformers would then load the base together with the adapter.
    """
    out = Path(out).expanduser()
    if base and out.is_dir() and os.path.realpath(out) == os.path.realpath(os.path.expanduser(base)):
        raise OutputError(f"{out} is the base's own folder; choose another folder (--out)")


def _sums(adapter: Path) -> dict[str, str]:
    """The checksums of an adapter's files."""
    return {name: file_sum(adapter / name) for name in ADAPTER_FILES if (adapter / name).is_file()}


def _best_step(checkpoint: Path) -> int:
    """The step of the best adapter that a checkpoint names; 0 if it names none."""
    with suppress(ResumeError, KeyError, TypeError):
        return int(read_state(checkpoint)["extra"]["totals"]["best_step"])
    return 0
