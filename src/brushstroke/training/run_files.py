"""Which files of an output folder brushstroke wrote: their JSON keys tell, never their names alone.

It reads and removes; it writes nothing.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from brushstroke.errors import OutputError
from brushstroke.files import LEAVING, PARTIAL, REPLACED, STAGING, SUMS, remove_empty, remove_files
from brushstroke.formats import ADAPTER_FILES
from brushstroke.formats.peft import ADAPTER_KEYS, CARD, CONFIG, README
from brushstroke.training.checkpoint import STATE, STATE_KEYS, TENSORS

METRICS, EVALUATIONS, RUN, CHECKPOINTS = "metrics.jsonl", "eval.jsonl", "run.json", "checkpoints"
KEYS = {  # of JSON files, or of their first lines
    METRICS: {"step", "loss", "real_tokens"},
    EVALUATIONS: {"step", "loss", "trained_tokens"},
    RUN: {"settings", "versions", "steps"},
    STATE: STATE_KEYS,
    **ADAPTER_KEYS,
}
MARKS = (METRICS, EVALUATIONS, RUN, CARD)  # any of them says that a run or an adapter of ours is here
INSIDE = {"step": (STATE, TENSORS), "best": ADAPTER_FILES}  # what a folder of checkpoints holds
_WRITTEN = "|".join(map(re.escape, (METRICS, EVALUATIONS, RUN)))
PARTIAL_FILE = re.compile(rf"{re.escape(PARTIAL)}\d+-({_WRITTEN})")  # and a file


def is_ours(path: Path) -> bool:
    """Whether a file holds the keys that we write there."""
    found = _content(path)
    return isinstance(found, dict) and KEYS[path.name] <= found.keys()


def is_damaged(path: Path) -> bool:
    """Whether a file holds nothing by which it could be told whose it is."""
    return not _content(path)


def folders_of(folder: Path, kind: str) -> list[Path]:
    """The folders of a kind ("step" or "best") with names that a run gives, by their steps."""
    found = (folder / CHECKPOINTS).glob(f"{kind}-*")
    named = [path for path in found if re.fullmatch(rf"{kind}-\d{{8,}}", path.name)]
    return sorted(named, key=lambda path: int(path.name.partition("-")[2]))


def refuse_strangers(folder: Path) -> None:
    """Check that everything by a name that a run uses is of a run of ours.

    Raises:
        OutputError: it is another program's or the user's, or a link or a folder where we write none.
    """
    sure = any(is_ours(folder / name) for name in MARKS)
    sure = sure or any(is_ours(step / STATE) for step in folders_of(folder, "step"))
    documented = is_ours(folder / RUN) or is_ours(folder / CARD)
    for name in (*MARKS[:3], *ADAPTER_FILES):
        path = folder / name
        if path.is_symlink() or path.exists():
            known = documented if name == README else _known(path, sure)
            if not (path.is_file() and known):
                raise _refusal(path)
    kept = [(path, kind) for kind in INSIDE for path in folders_of(folder, kind)]
    for path in (folder / CHECKPOINTS, *(path for path, _ in kept)):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise _refusal(path)
    for path, kind in kept:
        mark = path / (STATE if kind == "step" else CARD)
        present = [path / name for name in INSIDE[kind] if (path / name).exists()]
        for file in present:
            if not (file.is_file() and _known(file, sure or is_ours(mark))):
                raise _refusal(file)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint or a best adapter; what a user put beside its files stays."""
    remove_leftovers(folder)
    remove_files(folder, INSIDE[folder.name.partition("-")[0]])


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted writes of ours left in a folder, by exactly the names that they use."""
    for entry in list(folder.iterdir()) if folder.is_dir() else []:
        if STAGING.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            inner = [entry / name for name in (LEAVING, REPLACED)]
            for old in inner:
                remove_empty(old)
            if not any(map(os.path.lexists, inner)):  # else there are files for `put_back` to return
                remove_files(entry, (STATE, TENSORS, SUMS, *ADAPTER_FILES))
        elif PARTIAL_FILE.fullmatch(entry.name) and entry.is_file():
            entry.unlink()


def _known(path: Path, sure: bool) -> bool:
    """Whether a file is ours, where `sure` says that a run of ours is there."""
    if path.name not in KEYS:
        return sure
    if path.name == CONFIG:  # every adapter of PEFT's has it
        return sure and (is_ours(path) or is_damaged(path))
    return is_ours(path) or (sure and is_damaged(path))


def _content(path: Path) -> Any:
    """The JSON of a file, or of its first line; None where there is none to read."""
    try:
        text = path.read_text("utf-8")
        return json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except (OSError, ValueError, RecursionError):
        return None


def _refusal(path: Path) -> OutputError:
    what = "is a link" if path.is_symlink() else "was not written by brushstroke"
    return OutputError(f"{path} {what}, and the run would overwrite it; move it, or choose another folder")
