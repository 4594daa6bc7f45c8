"""Reads JSON files and computes checksums.

It writes no files; the package `outputs` does.
"""

import hashlib
import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any


def read_json(path: Path | Traversable) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is not JSON in UTF-8, or is nested too deeply to be read.
        OSError: there is no such file, or it cannot be read.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def file_sum(path: Path) -> str:
    """The SHA-256 checksum of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
