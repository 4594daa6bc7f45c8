"""Keeps dequantised GGUF models on disk, because reading them from the GGUF file takes much longer.

Each is a model folder, named by a hash of the file's content, the dtype and the versions of the packages that
read it. It does not read GGUF files.
"""

import hashlib
import os
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brushstroke.errors import OutputError
from brushstroke.outputs import clear_leftovers, replace_folder
from brushstroke.samples.assets import cache_folder

FORMAT = "1"  # change it whenever the content of a folder changes
LIMIT = 16 * 2**30  # maximum bytes of all folders; a larger model is not kept
_MARKER = "config.json"


def folder() -> Path:
    """`gguf` in the cache folder (`BRUSHSTROKE_CACHE`, or ~/.cache/brushstroke)."""
    return cache_folder() / "gguf"


def key_of(path: Path) -> str:
    """A hash of a GGUF file and of the packages that read it."""
    packages = (f"{name} {version(name)}" for name in ("transformers", "gguf"))
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    said = "; ".join((FORMAT, content, *packages))
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def find(key: str, dtype: torch.dtype | None = None) -> Path | None:
    """The folder of a model in a dtype, or in any, if it is kept; it then counts as used now."""
    named = f"{key}-*" if dtype is None else _name(key, dtype)
    found = next((path for path in folder().glob(named) if (path / _MARKER).is_file()), None)
    if found is not None:
        with suppress(OSError):
            os.utime(found)
    return found


def forget(kept: Path) -> None:
    """Delete a folder that cannot be read."""
    shutil.rmtree(kept, ignore_errors=True)


def keep(key: str, model: Any, tokenizer: Any) -> None:
    """Keep a model and its tokenizer; does nothing if it is too large or cannot be written."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    target = folder() / _name(key, model.dtype)
    with suppress(OSError, OutputError):
        folder().mkdir(parents=True, exist_ok=True)
        if _make_room(size) and shutil.disk_usage(folder()).free > 2 * size:
            clear_leftovers(target, lambda _: True)
            with replace_folder(target, lambda _: True) as new:
                tokenizer.save_pretrained(new)
                model.save_pretrained(new)


def _name(key: str, dtype: torch.dtype) -> str:
    return f"{key}-{str(dtype).removeprefix('torch.')}"


def _make_room(size: int) -> bool:
    """Delete the folders that were not used for longest until one of this size fits; whether it fits."""
    found = [path for path in folder().iterdir() if not path.name.startswith(".")]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in found}
    total = size + sum(sizes.values())
    for path in sorted(found, key=lambda path: path.stat().st_mtime):
        if total <= LIMIT or size > LIMIT:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= sizes[path]
    return total <= LIMIT
