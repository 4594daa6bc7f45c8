"""Checks the folder of a study before anything is loaded or trained: another study, other files.

Does not write files (`studies.store` does).
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brushstroke.errors import OutputError, ResumeError
from brushstroke.outputs import OwnFiles, RunLock, output_errors, read_first, refuse_existing

STUDY, RUNS, OUTCOME = "study.json", "runs", "outcome.json"
RESULTS, REPORT = "results.json", "report.html"
FIGURES, TABLES = "figures", "tables"  # folders, and names of the notes that list the study's files in them
BASE = "base"  # a model that was trained for the study before it starts
ALWAYS = {"studies", "seeds", "arms"}  # keys of every study's identity; a foreign study.json lacks them
OWN_FILES = OwnFiles((RUNS, RESULTS, REPORT, FIGURES, TABLES), otherwise=f"is there without a {STUDY}")


def check_folder(folder: Path, *, overwrite: bool = False, with_base: bool = False) -> None:
    """Check that a study can start or continue in a folder; writes nothing.

    Args:
        folder: the folder of the study, which may be missing.
        overwrite: whether the study starts over.
        with_base: whether the study keeps its own model in the folder, as those of `--tiny` do.

    Raises:
        OutputError: the folder contains other files, or files with a study's names but without a study.json,
            or a study that keeps no model there.
    """
    if not (folder / STUDY).is_file():
        refuse_existing(folder, overwrite, ignoring=(BASE,))
        OWN_FILES.refuse_foreign(folder)
        return
    read_study(folder)
    if with_base and not overwrite and not (folder / BASE).is_dir():
        raise OutputError(
            f"{folder} holds another study: the model of a study with --tiny is in {folder / BASE}, which is "
            "missing; choose another folder, or start over (--overwrite)"
        )


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the study in a folder, if there is one, has these settings: all of its identity, or some.

    Raises:
        OutputError: study.json cannot be read, or was not written by a study.
        ResumeError: they differ; the message lists the differences.
    """
    if not (folder / STUDY).is_file():
        return
    now, then = json.loads(json.dumps(settings)), read_study(folder)["identity"]
    if differences := list(_differences(now, {name: then.get(name) for name in now})):
        done = len(list((folder / RUNS).glob(f"*/{OUTCOME}")))
        raise ResumeError(
            f"{folder} holds another study ({'; '.join(differences)}); give the same settings to go on with "
            "it, choose another folder, or start over with --overwrite (overwrite=True), which removes its "
            f"{done} finished runs"
        )


def refuse_inside(folder: Path) -> None:
    """Check that a folder is not inside those that a study fills: its model and its runs.

    Raises:
        OutputError: it is.
    """
    path = Path(os.path.realpath(folder))
    for study in path.parents:
        if path.relative_to(study).parts[0] in (BASE, RUNS):
            found = read_first(study / STUDY)
            identity = found.get("identity") if isinstance(found, dict) else None
            if isinstance(identity, dict) and identity.keys() >= ALWAYS:
                raise OutputError(f"{folder} is inside the study {study}; choose another folder")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager: no other process runs a study in this folder; creates the folder if it is missing.

    Raises:
        OutputError: another process does, or the folder cannot be created.
    """
    lock = RunLock(folder)
    try:
        with output_errors(folder):
            lock.take()
        yield
    finally:
        lock.release()


def planned_before(folder: Path) -> dict[str, Any] | None:
    """The stored plan of the study in a folder; None if there is none.

    Raises:
        OutputError: study.json cannot be read, or was not written by a study.
    """
    return read_study(folder)["notes"].get("plan") if (folder / STUDY).is_file() else None


def base_before(folder: Path) -> Any:
    """The hash of the base in the identity of the study in a folder; None if there is none.

    Raises:
        OutputError: study.json cannot be read, or was not written by a study.
    """
    return read_study(folder)["identity"].get("base") if (folder / STUDY).is_file() else None


def read_study(folder: Path) -> dict[str, Any]:
    """The contents of study.json: the identity of the study, and its notes.

    Raises:
        OutputError: the file cannot be read, or was not written by a study.
    """
    file = folder / STUDY
    try:
        whole = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} cannot be read ({error}); choose another folder") from error
    identity, notes = (whole.get("identity"), whole.get("notes")) if isinstance(whole, dict) else (None, None)
    if not isinstance(identity, dict) or not isinstance(notes, dict) or not identity.keys() >= ALWAYS:
        raise OutputError(f"{file} was not written by a study; move it away, or choose another folder")
    return whole


def _differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> Iterator[str]:
    """The settings that differ, by name, with both values."""
    for name in dict.fromkeys([*now, *then]):
        new, old = now.get(name), then.get(name)
        if isinstance(new, dict) and isinstance(old, dict):
            yield from _differences(new, old)
        elif new != old:
            yield f"{name}: now {_brief(new)}, then {_brief(old)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
