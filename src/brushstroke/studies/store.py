"""Writes the folder of a study: its identity, notes and finished runs; consistent after a kill too.

Does not execute runs. A run is finished when its outcome file exists; it is written last, atomically.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.errors import AdapterFileError, OutputError
from brushstroke.formats import load, remove
from brushstroke.outputs import output_errors, remove_empty, remove_files, write_file, write_files
from brushstroke.studies.arm_run import Outcome
from brushstroke.studies.arms import RUN_KEY, Run
from brushstroke.study_folder import (
    FIGURES,
    OUTCOME,
    REPORT,
    RESULTS,
    RUNS,
    STUDY,
    TABLES,
    check_folder,
    read_study,
    require_settings,
)

ADAPTER = "adapter"
ROWS = "test_rows.json"  # summed loss of each row of the test split; missing in runs of older versions
START_OVER = "start over (--overwrite), or choose another folder"


class Store:
    """The folder of one study.

    Args:
        folder: created if it does not exist.
        identity: settings that must equal those of the study in the folder, as JSON types, with the keys of
            `ALWAYS`.
        overwrite: remove the files of a study in the folder.

    Raises:
        OutputError: the folder contains other files, or cannot be written.
        ResumeError: the folder contains a study with another identity; the message lists the differences.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = folder
        now = json.loads(json.dumps(identity))
        check_folder(folder, overwrite=overwrite)
        if overwrite:
            self._clear()
        if not overwrite:
            require_settings(folder, now)
        if overwrite or not (folder / STUDY).is_file():
            with output_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / STUDY, json.dumps({"identity": now, "notes": {}}, indent=2) + "\n")

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.folder / RUNS

    def note(self, name: str) -> Any:
        """A stored note; None if there is none."""
        return read_study(self.folder)["notes"].get(name)

    def keep_note(self, name: str, value: Any) -> None:
        """Store a note, which a resumed study can read."""
        whole = read_study(self.folder)
        whole["notes"][name] = value
        write_file(self.folder / STUDY, json.dumps(whole, indent=2) + "\n")

    def outcome(self, run: Run) -> Outcome | None:
        """The outcome of a run; None if the run is not finished.

        Raises:
            OutputError: the file is damaged.
        """
        file = self.runs / run.key / OUTCOME
        if not file.is_file():
            return None
        with damaged(file, "remove this file, and the run is done again"):
            return Outcome.from_dict(json.loads(file.read_text("utf-8")))

    def test_rows(self, run: Run) -> tuple[float, ...]:
        """The summed loss of each row of the test split; empty if it was not stored.

        Raises:
            OutputError: the file is damaged.
        """
        file = self.runs / run.key / ROWS
        if not file.is_file():
            return ()
        with damaged(file, "remove this file; intervals are then valid only for these test rows"):
            return tuple(float(loss) for loss in json.loads(file.read_text("utf-8")))

    def finish(self, run: Run, outcome: Outcome) -> None:
        """Store the outcome of a run, which is then finished and never runs again."""
        files = {OUTCOME: json.dumps(outcome.as_dict(), indent=2, allow_nan=True) + "\n"}
        if rows := outcome.test_rows:
            files[ROWS] = json.dumps([float(f"{loss:.7g}") for loss in rows]) + "\n"
        write_files(self.runs / run.key, files, last=OUTCOME)

    def adapter(self, run: Run) -> Adapter:
        """The update of a finished run.

        Raises:
            OutputError: the update is damaged or missing.
        """
        try:
            return load(self.runs / run.key / ADAPTER)
        except AdapterFileError as error:
            raise OutputError(
                f"{' '.join(str(error).split())}; remove {self.runs / run.key}, and the run is done again"
            ) from error

    def forget_adapter(self, run: Run) -> None:
        """Remove the update of a run that no report needs; keeps its scores."""
        with suppress(OutputError):
            remove(self.runs / run.key / ADAPTER)

    def _clear(self) -> None:
        """Remove everything that the study wrote except study.json, and folders that become empty."""
        if not (self.folder / STUDY).is_file():
            return
        files = [file for kind in (FIGURES, TABLES) for file in self._noted(kind)]
        runs = [run for run in self.runs.glob("*") if RUN_KEY.fullmatch(run.name)]
        folders = [self.runs, self.folder / FIGURES, self.folder / TABLES]
        places = (*folders, *runs, *(run / ADAPTER for run in runs))
        if links := [str(place) for place in places if place.is_symlink()]:
            raise OutputError(
                f"{', '.join(links)}: a link, and what it leads to is not removed; move it away"
            )
        with output_errors(self.folder):
            for run in runs:
                remove(run / ADAPTER)
                remove_files(run, (OUTCOME, ROWS))
                remove_empty(run)
            for file in (self.folder / RESULTS, self.folder / REPORT, *files):
                file.unlink(missing_ok=True)
            remove_empty(*folders)

    def _noted(self, kind: str) -> list[Path]:
        """The files in one of the study's folders that the study wrote."""
        noted = self.note(kind)
        names = noted if isinstance(noted, list) else []
        return [file for file in (self.folder / kind).glob("*") if file.is_file() and file.name in names]


@contextmanager
def damaged(file: Path, remedy: str) -> Iterator[None]:
    """Context manager for parsing a file: reports any error in its contents as one message.

    Raises:
        OutputError: the file cannot be read or parsed; the message gives the file and the remedy.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file} is damaged; {remedy}") from error
