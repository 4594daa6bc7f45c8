"""JSON Lines files with one object per line, each with the number of its step.

It does not interpret the other fields.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from brushstroke.errors import ResumeError
from brushstroke.outputs import output_errors, write_file


def append(path: Path, line: Mapping[str, Any], *, first: bool = False) -> None:
    """Append one line and flush it to the disk; a new file is created with its first line.

    Args:
        path: the file.
        line: the object.
        first: replace an older file by a new one, in one step.

    Raises:
        OutputError: it cannot be written.
    """
    if first or not path.exists():
        write_file(path, json.dumps(line) + "\n")
        return
    with output_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_until(path: Path, step: int, *, every: bool = False) -> bytes:
    """The lines of a file up to the line of a step, without later lines (complete or not).

    Args:
        path: the file.
        step: the last step, whose line must exist; 0 for none.
        every: whether all earlier steps must have a line too.

    Raises:
        ResumeError: a required line is missing, or cannot be read.
    """
    kept, steps = [], []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        found = _step(line)
        if found is None or found > step:
            break
        kept.append(line + b"\n")
        steps.append(found)
    if (steps != list(range(1, step + 1))) if every else (max(steps, default=0) != step):
        raise ResumeError(
            f"{path} is damaged: a line up to step {step}, which the checkpoint needs, is missing or "
            "cannot be read; restore the file, remove the checkpoint of that step to use an earlier one, or "
            "start over with overwrite (--overwrite)"
        )
    return b"".join(kept)


def _step(line: bytes) -> int | None:
    with suppress(ValueError, KeyError, TypeError):
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else None
    return None
