"""Decides which files in an output folder a training run wrote, by their JSON keys as well as their names.

It reads and removes files; it writes none.
"""

import re
from functools import partial
from pathlib import Path

from brushstroke.formats import ADAPTER_FILES
from brushstroke.formats.peft import ADAPTER_KEYS, CARD, METRICS, README, RUN
from brushstroke.outputs import (
    OwnFiles,
    clear_leftovers_in,
    foreign,
    has_keys,
    remove_partial_files,
)
from brushstroke.training.checkpoint import OWN_FILES as STEP_FILES
from brushstroke.training.checkpoint import STATE

EVALUATIONS, CHECKPOINTS = "eval.jsonl", "checkpoints"
OWN_FILES = OwnFiles(
    (METRICS, EVALUATIONS, RUN, *ADAPTER_FILES),
    {
        METRICS: has_keys("step", "loss", "real_tokens"),
        EVALUATIONS: has_keys("step", "loss", "trained_tokens"),
        RUN: has_keys("settings", "versions", "steps"),
        **ADAPTER_KEYS,
    },
    marks=(METRICS, EVALUATIONS, RUN, CARD),
    recognised_with={README: (RUN, CARD)},
)
INSIDE = {"step": STEP_FILES, "best": OwnFiles(ADAPTER_FILES, ADAPTER_KEYS, (CARD,))}


def checkpoint_folders(folder: Path, kind: str) -> list[Path]:
    """The checkpoint folders of a kind ("step" or "best") that have a run's names, sorted by step."""
    found = (folder / CHECKPOINTS).glob(f"{kind}-*")
    return sorted((path for path in found if _is_of(kind, path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.partition("-")[2])


def names_in(checkpoint: Path) -> tuple[str, ...]:
    """The names of the files that a run writes into a checkpoint folder of this kind."""
    return INSIDE[checkpoint.name.partition("-")[0]].names


def refuse_foreign(folder: Path) -> None:
    """Check that everything with the name of a run's file was written by a run.

    Raises:
        OutputError: something was written by the user or by another program, or there is a link or a file
            where a run has a folder.
    """
    kept = [(path, kind) for kind in INSIDE for path in checkpoint_folders(folder, kind)]
    is_run = any(STEP_FILES.is_own(path / STATE) for path, kind in kept if kind == "step")
    OWN_FILES.refuse_foreign(folder, is_own_folder=is_run)
    is_run = is_run or any(OWN_FILES.is_own(folder / name) for name in OWN_FILES.marks)
    for path in (folder / CHECKPOINTS, *(path for path, _ in kept)):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise foreign(path, OWN_FILES.otherwise)
    for path, kind in kept:
        INSIDE[kind].refuse_foreign(path, is_own_folder=is_run)


def clear_run(folder: Path) -> None:
    """Remove temporary files of killed processes; restore a checkpoint whose replacement was interrupted."""
    remove_partial_files(folder, OWN_FILES.names.__contains__)
    checkpoints = folder / CHECKPOINTS
    for kind in () if checkpoints.is_symlink() else INSIDE:
        clear_leftovers_in(checkpoints, partial(_is_of, kind), INSIDE[kind].names.__contains__)


def _is_of(kind: str, name: str) -> bool:
    return bool(re.fullmatch(rf"{kind}-\d{{8,}}", name))
