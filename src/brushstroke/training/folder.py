"""The output folder of a training run: metrics, evaluations, checkpoints, and at the end the adapter.

It trains nothing. The adapter's files appear when the run is complete, not before.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.errors import OutputError, ResumeError
from brushstroke.files import output_errors, refuse_existing, remove_partial, write_file
from brushstroke.formats import ADAPTER_FILES, save
from brushstroke.training.checkpoint import STATE, read_state

METRICS, EVALUATIONS, RUN, CHECKPOINTS = "metrics.jsonl", "eval.jsonl", "run.json", "checkpoints"
PARTIAL = ".partial-"  # what an interrupted write leaves behind
MARKS = {  # keys of JSON files, or of their first lines, that a run or an adapter left
    METRICS: {"step", "loss", "real_tokens"},
    EVALUATIONS: {"step", "loss", "trained_tokens"},
    RUN: {"settings", "versions", "steps"},
    "adapter_config.json": {"peft_type"},
}
KEPT = 2  # checkpoints


class RunFolder:
    """The files of one run; nothing is made on disk before the first optimiser step is recorded.

    Args:
        path: the folder.
        resume: go on from the last checkpoint, if there is one.
        overwrite: replace an earlier run's files; files of other names stay.

    Raises:
        OutputError: the folder holds files and neither flag is given, or a stranger's by a run's names.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = Path(path).expanduser()
        has_run = self.complete or bool(self.checkpoints())
        self.resuming = resume and has_run
        if not self.resuming:
            refuse_existing(self.path, overwrite or (resume and self._only_ours()))
            self._refuse_strangers()

    @property
    def complete(self) -> bool:
        """Whether a finished adapter stands in the folder."""
        return (self.path / ADAPTER_FILES[0]).is_file() and (self.path / RUN).is_file()

    def checkpoints(self) -> list[Path]:
        """The checkpoints in order of their steps."""
        return [folder for folder in self._kept("step") if (folder / STATE).is_file()]

    def last_state(self) -> tuple[Path, dict[str, Any]] | None:
        """The last checkpoint and its state, or None where there is none."""
        found = self.checkpoints()
        return (found[-1], read_state(found[-1])) if self.resuming and found else None

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step belongs."""
        return self.path / CHECKPOINTS / f"step-{step:08d}"

    def best(self, step: int) -> Path:
        """Where the best adapter so far is kept, if it is the one of this step."""
        return self.path / CHECKPOINTS / f"best-{step:08d}"

    def prune(self, best_step: int) -> None:
        """Remove all checkpoints but the last two, older best adapters, and what interrupted writes left."""
        inside = self.path / CHECKPOINTS
        older = [folder for folder in self._kept("best") if folder != self.best(best_step)]
        for folder in [*self.checkpoints()[:-KEPT], *older, *inside.glob(f"{PARTIAL}*")]:
            shutil.rmtree(folder, ignore_errors=True)

    def open(self, step: int) -> None:
        """Make the folder ready for the steps after this one: later lines of an interrupted run are cut off.

        Raises:
            OutputError: it cannot be written.
        """
        with output_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ADAPTER_FILES:
                (self.path / name).unlink(missing_ok=True)
            if step:
                self._cut(METRICS, step)
                self._cut(EVALUATIONS, step)
            else:
                for name in (METRICS, EVALUATIONS, RUN):
                    (self.path / name).unlink(missing_ok=True)
                for folder in [*self.checkpoints(), *self._kept("best")]:
                    shutil.rmtree(folder, ignore_errors=True)
            remove_partial(self.path)

    def record(self, name: str, line: Mapping[str, Any]) -> None:
        """Append one line of JSON and flush it to the disk at once.

        Raises:
            OutputError: it cannot be written.
        """
        with output_errors(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, adapter: Adapter, summary: Mapping[str, Any]) -> None:
        """Write the summary, then the adapter; from now on the run is complete.

        Raises:
            OutputError: they cannot be written.
        """
        write_file(self.path / RUN, json.dumps(summary, indent=2, default=str) + "\n")
        save(adapter, self.path, overwrite=True)

    def summary(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
            ResumeError: it cannot be read.
        """
        try:
            summary = json.loads((self.path / RUN).read_text("utf-8"))
            return {**summary, "steps": summary["steps"], "settings": dict(summary["settings"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(
                f"{self.path / RUN} cannot be read ({error}); remove it and start over with overwrite"
            ) from error

    def _kept(self, kind: str) -> list[Path]:
        """The folders of a kind ("step" or "best") with names that a run gives, by their steps."""
        found = (self.path / CHECKPOINTS).glob(f"{kind}-*")
        return sorted(folder for folder in found if re.fullmatch(rf"{kind}-\d{{8,}}", folder.name))

    def _refuse_strangers(self) -> None:
        """Refuse to replace what no run and no adapter left: a README.md, metrics of another program, ..."""
        ours = {name for name, keys in MARKS.items() if _holds(self.path / name, keys)}
        for name in dict.fromkeys([*MARKS, *ADAPTER_FILES]):
            known = name in ours if name in MARKS else ours or self.checkpoints()
            if (self.path / name).exists() and not known:
                raise OutputError(
                    f"{self.path / name} is not of a run, and this one's would replace it; move it, or "
                    "choose another folder"
                )

    def _only_ours(self) -> bool:
        known = {METRICS, EVALUATIONS, RUN, CHECKPOINTS, *ADAPTER_FILES}
        names = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        return all(name in known or name.startswith(PARTIAL) for name in names)

    def _cut(self, name: str, step: int) -> None:
        """Keep the lines up to a step, byte for byte; an unfinished last line goes too."""
        path = self.path / name
        if not path.is_file():
            return
        kept = []
        for line in path.read_text("utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError):
                break
            kept.append(line)
        write_file(path, "".join(kept))


def _holds(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys, or lines of them; a damaged one counts as one."""
    try:
        text = path.read_text("utf-8")
        found = json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except OSError:
        return False
    except ValueError:
        return True
    return isinstance(found, dict) and keys <= found.keys()
