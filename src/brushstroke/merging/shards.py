"""Copies safetensors files and replaces the bytes of their adapted tensors.

One tensor is in memory at a time; names, order and metadata stay. It does not choose the tensors.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brushstroke.errors import MergeError

CHUNK = 16 * 2**20  # bytes held while copying
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Edit:
    """A tensor to write: its key, how to make it (as stored), and whether the file lacks the key."""

    key: str
    make: Callable[[], Tensor]
    added: bool = False
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Header:
    """The table at the beginning of a safetensors file, and the offset at which the numbers start."""

    entries: Mapping[str, Any]
    start: int

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Read it; the caller has checked that the file is complete."""
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return cls(json.loads(file.read(size)), 8 + size)

    def bytes(self) -> int:
        """The size of the numbers."""
        return max(
            (entry["data_offsets"][1] for key, entry in self.entries.items() if key != "__metadata__"),
            default=0,
        )


def write_shard(source: Path, target: Path, edits: Iterable[Edit]) -> None:
    """Copy a file with other numbers in some tensors, and with new tensors at its end.

    Raises:
        MergeError: a new tensor does not have the size of the one that it replaces.
    """
    edits = list(edits)
    added = [edit for edit in edits if edit.added]
    header = Header.read(source)
    if added:
        header = _copy_with_room(source, target, header, added)
    else:
        shutil.copyfile(source, target)
    with target.open("r+b") as file:
        for edit in edits:
            begin, end = header.entries[edit.key]["data_offsets"]
            raw = _bytes(edit.make())
            if raw.nbytes != end - begin:
                raise MergeError(
                    f"{edit.key} in {source.name} holds {end - begin} bytes and its merged form "
                    f"{raw.nbytes}; fetch the base again"
                )
            file.seek(header.start + begin)
            file.write(raw)
            del raw
        file.flush()
        os.fsync(file.fileno())


def _copy_with_room(source: Path, target: Path, header: Header, added: list[Edit]) -> Header:
    entries, end = dict(header.entries), header.bytes()
    for edit in added:
        width = next(dtype.itemsize for dtype, name in DTYPE_NAMES.items() if name == edit.dtype)
        size = width * torch.Size(edit.shape).numel()
        entries[edit.key] = {
            "dtype": edit.dtype,
            "shape": list(edit.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    table = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    table += b" " * (-len(table) % 8)
    with source.open("rb") as old, target.open("wb") as new:
        old.seek(header.start)
        new.write(struct.pack("<Q", len(table)) + table)
        shutil.copyfileobj(old, new, CHUNK)
        new.truncate(8 + len(table) + end)
    return Header(entries, 8 + len(table))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def update_index(source: Path, target: Path, added: Mapping[str, tuple[str, int, int]]) -> None:
    """Copy an index and enter new tensors: key → (file, bytes, numbers)."""
    index = json.loads(source.read_text("utf-8"))
    metadata = index.setdefault("metadata", {})
    for key, (file, size, count) in added.items():
        index["weight_map"][key] = file
        for name, amount in (("total_size", size), ("total_parameters", count)):
            if isinstance(metadata.get(name), int):
                metadata[name] += amount
    target.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", "utf-8")
