"""Records: files with one JSON object a line, which say the step that they are of.

It knows nothing of what else the lines say.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from brushstroke.errors import ResumeError
from brushstroke.outputs import output_errors, write_file


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line and flush it to the disk at once; a new file appears with its line.

    Raises:
        OutputError: it cannot be written.
    """
    if not path.exists():
        write_file(path, json.dumps(line) + "\n")
        return
    with output_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_until(path: Path, step: int, *, every: bool = False) -> bytes:
    """The lines of a record up to the one of a step; later ones, whole or not, are left out.

    Args:
        path: the record.
        step: the last one whose line must be there; 0 for none.
        every: whether all the steps before it must have their lines too.

    Raises:
        ResumeError: a line that must be there is missing, or cannot be read.
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
            f"{path} is damaged: a line up to step {step}, on which the checkpoint counts, is missing or "
            "cannot be read; put it back, remove the checkpoint of that step to use an earlier one, or start "
            "over with overwrite (--overwrite)"
        )
    return b"".join(kept)


def _step(line: bytes) -> int | None:
    with suppress(ValueError, KeyError, TypeError):
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else None
    return None
