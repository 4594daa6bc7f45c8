"""Keeps dequantised GGUF models on disk, because reading them from the GGUF file takes much longer.

Each is a model folder, named by a hash of the file's content, the dtype and the versions of the packages that
read it. It does not read GGUF files.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from brushstroke.files import file_sum
from brushstroke.outputs import clear_leftovers, kept_in, make_room, replace_folder
from brushstroke.samples.assets import cache_folder

FORMAT = "1"  # change it whenever the content of a folder changes
LIMIT = 16 * 2**30  # maximum bytes of all folders; a larger model is not kept
_SUMS = "sha256.json"  # name → checksum of each other file
_ENTRY = re.compile(r"[0-9a-f]{32}-\w+")


def folder() -> Path:
    """`gguf` in the cache folder (`BRUSHSTROKE_CACHE`, or ~/.cache/brushstroke)."""
    return cache_folder() / "gguf"


def key_of(path: Path) -> str:
    """A hash of a GGUF file and of the packages that read it."""
    packages = (f"{name} {version(name)}" for name in ("transformers", "gguf"))
    said = "; ".join((FORMAT, file_sum(path), *packages))
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def find(key: str, dtype: torch.dtype | None = None) -> Path | None:
    """The folder of a model in a dtype, or in any, if it is kept; it then counts as used now.

    A folder whose files do not match their checksums is deleted; without a dtype the weights are not checked.
    """
    named = f"{key}-*" if dtype is None else _name(key, dtype)
    for found in folder().glob(named):
        if _is_whole(found, weights=dtype is not None):
            with suppress(OSError):
                os.utime(found)
            return found
        shutil.rmtree(found, ignore_errors=True)
    return None


def keep(key: str, path: Path, model: Any, tokenizer: Any) -> None:
    """Keep a model and its tokenizer, if the file at `path` has not changed since `key` was computed.

    Does nothing if the model is too large or cannot be written: it is then read from its file again.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    target = folder() / _name(key, model.dtype)
    with suppress(Exception):
        folder().mkdir(parents=True, exist_ok=True)
        if (
            make_room(entries(), size, LIMIT)
            and shutil.disk_usage(folder()).free > 2 * size
            and key_of(path) == key
        ):
            clear_leftovers(target, lambda _: True)
            with replace_folder(target, lambda _: True) as new:
                tokenizer.save_pretrained(new)
                model.save_pretrained(new)
                sums = {file.name: file_sum(file) for file in new.iterdir()}
                (new / _SUMS).write_text(json.dumps(sums), "utf-8")


def entries() -> list[Path]:
    """The folders that are kept."""
    return kept_in(folder(), _ENTRY)


def _is_whole(found: Path, *, weights: bool) -> bool:
    try:
        sums = json.loads((found / _SUMS).read_text("utf-8"))
        return all(
            file_sum(found / name) == stored
            for name, stored in sums.items()
            if weights or not name.endswith(".safetensors")
        )
    except (OSError, ValueError, AttributeError):
        return False


def _name(key: str, dtype: torch.dtype) -> str:
    return f"{key}-{str(dtype).removeprefix('torch.')}"
