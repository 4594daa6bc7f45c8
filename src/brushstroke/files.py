"""Reads JSON and safetensors files and computes checksums.

It writes no files; the package `outputs` does.
"""

import hashlib
import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


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


def read_tensors(content: bytes) -> dict[str, "Tensor"]:
    """The tensors in the bytes of a safetensors file, in the order of their names, copied to new memory.

    Reading the same bytes twice gives the same results to the last bit: products round differently when the
    memory of a tensor is not aligned, and views of the bytes are aligned at random.

    Raises:
        safetensors.SafetensorError: they are not the bytes of such a file.
    """
    import safetensors.torch

    tensors = safetensors.torch.load(content)  # in random order
    return {name: tensors[name].clone() for name in sorted(tensors)}


def file_sum(path: Path) -> str:
    """The SHA-256 checksum of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
