"""The singular directions of base weights, and a cache of them on disk.

Does not use adapters and does not read weight files: the cache identifies a weight by its values.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.analysis.weights import finite_norm
from brushstroke.errors import BaseLoadError, OutputError
from brushstroke.files import read_tensors
from brushstroke.lowrank.cosines import proven_floor
from brushstroke.lowrank.krylov import Shifted, dense_svd, top_svd
from brushstroke.outputs import make_room, write_file
from brushstroke.samples.assets import cache_folder

STEP = 40  # the number of directions of a large W is a multiple of this, so that analyses share them
SMALLEST = 2**16  # a W with fewer entries is not cached
LIMIT = 4 * 2**30  # maximum bytes of all files
LARGEST = 1e18  # largest norm of a W whose products with WᵀW are in the range of float32
FORMAT = "brushstroke directions 1"  # change it whenever the mathematics or the layout changes
SUFFIX = ".directions"


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular directions of one W, strongest first.

    Args:
        norm: ‖W‖_F.
        left: input directions, in columns.
        sigma: descending.
        right: output directions, in rows.
        residual: ‖Wᵀ·left_i − sigma_i·right_i‖ of each; 0 if they come from a full SVD of W.
    """

    norm: float
    left: Float[Tensor, "d k"]
    sigma: Float[Tensor, " k"]
    right: Float[Tensor, "k h"]
    residual: Float[Tensor, " k"]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a cache file stores."""
        parts = {name: getattr(self, name) for name in ("left", "sigma", "right", "residual")}
        return {**parts, "norm": torch.tensor(self.norm, dtype=torch.float64)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Directions":
        """The inverse of `tensors`."""
        parts = dict(tensors)
        return cls(norm=float(parts.pop("norm")), **parts)


class Working:
    """Converts W to the dtype of the computation: float64 for a full SVD, otherwise float32 or W's float64.

    Weights in half precision are converted into one buffer that is reused, which is many times faster than
    new memory for each. So a result is valid only until the next call.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def __call__(self, W: Float[Tensor, "d h"], whole: bool) -> Float[Tensor, "d h"]:
        """W in the dtype of the computation; W itself, not a copy, if it already has that dtype."""
        if whole or W.dtype in (torch.float64, torch.float32):
            return W.double() if whole else W
        if self._buffer.numel() < W.numel() or self._buffer.device != W.device:
            self._buffer = torch.empty(W.numel(), device=W.device)
        rows = _memory_rows(W)
        copied = self._buffer[: W.numel()].view(rows.shape).copy_(rows)
        return copied.mT if _is_transposed(W) else copied


class DirectionCache:
    """A folder with one file per weight and query, named by a hash of the weight's values and the query.

    Files are written atomically. A file that is damaged, or does not match its name, counts as missing. The
    files of all bases together stay below a limit: the least recently used files are deleted, and if all
    files belong to this run, no more are written.

    Args:
        folder: by default `directions` in the cache folder (`BRUSHSTROKE_CACHE`, or ~/.cache/brushstroke).
        limit: maximum size of all files, in bytes.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder or cache_folder() / "directions", limit
        self.used = self.kept = 0  # number of weights whose directions came from files, and of new files
        self.failure = ""  # why files cannot be written
        self._own_files: set[Path] = set()  # files that this run read or wrote

    def find(self, key: str) -> dict[str, Tensor] | None:
        """The tensors in the file of a key; None if the file is missing or damaged."""
        path = self._path(key)
        try:
            checksum, payload = path.read_bytes().split(b"\n", 1)
            if checksum.decode() != _sum(key, payload):
                return None
            found = read_tensors(payload)
        except Exception:  # missing or damaged in any way: the caller computes and replaces it
            return None
        self._own_files.add(path)
        with suppress(OSError):
            os.utime(path)
        return found

    def keep(self, key: str, found: dict[str, Tensor]) -> None:
        """Write the file of a key, unless it exceeds the limit or cannot be written (see `failure`)."""
        import safetensors.torch

        payload = safetensors.torch.save({name: tensor.cpu() for name, tensor in found.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            others = self.folder.glob(f"*{SUFFIX}")
            if make_room(others, len(payload), self.limit, spared=self._own_files):
                write_file(self._path(key), _sum(key, payload).encode() + b"\n" + payload)
                self._own_files.add(self._path(key))
                self.kept += 1
        except (OutputError, OSError) as error:
            self.failure = str(error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"


def base_directions(
    site: str,
    W: Float[Tensor, "d h"],
    k: int,
    *,
    whole: bool,
    seed: int = 0,
    cache: DirectionCache | None = None,
    working: Working | None = None,
) -> Directions:
    """At least the k strongest singular directions of W, from the cache if it has them.

    Args:
        site: the name of W, for error messages.
        W: in the dtype of its file.
        k: the number of directions; rounded up to a multiple of 40, so that several k share one result.
        whole: compute a full SVD of W in float64, and return all of its directions.
        seed: for the Krylov start.
        cache: read first, and written; None for no cache.
        working: converts W.

    Raises:
        BaseLoadError: W contains NaN or infinity, or its square is too large for float32.
    """
    k = -(-max(k, 1) // STEP) * STEP
    kept, keep = _cached(cache, W, "whole" if whole else f"{k} from {seed}")
    if kept is not None and cache is not None:
        cache.used += 1
        return Directions.of(kept)
    norm, work = finite_norm(site, W), (working or Working())(W, whole)
    if norm > LARGEST and work.dtype == torch.float32:
        raise BaseLoadError(
            f"{site}: the norm of W is {norm:.1g}; its square is too large for float32; download the "
            "model again"
        )
    if whole:
        parts = dense_svd(work)
        found = _contiguous(norm, *parts, torch.zeros_like(parts.sigma))
    else:
        top = top_svd(Shifted(work), k, generator=torch.Generator().manual_seed(seed))
        found = _contiguous(norm, top.left, top.sigma, top.right, top.residual)
    keep(found.tensors())
    return found


def base_floor(
    W: Float[Tensor, "d h"], strongest: float, working: Working, cache: DirectionCache | None = None
) -> float:
    """The share of sigma₁ below which W (d ≤ h) has no singular value, from the cache if it has it.

    See `proven_floor`.
    """
    kept, keep = _cached(cache, W, "floor")
    if kept is not None:
        return float(kept["floor"])
    floor = proven_floor(working(W, whole=False), strongest)
    keep({"floor": torch.tensor(floor, dtype=torch.float64)})
    return floor


def _cached(
    cache: DirectionCache | None, W: Float[Tensor, "d h"], asked: str
) -> tuple[dict[str, Tensor] | None, Callable[[dict[str, Tensor]], None]]:
    """What the cache holds for a question about W, and a function that stores a new answer."""
    if cache is None or W.numel() < SMALLEST:
        return None, lambda found: None
    key = _key(W, asked)
    return cache.find(key), partial(cache.keep, key)


def _contiguous(norm: float, *parts: Tensor) -> Directions:
    """Directions with the memory layout that a file gives, so that products with them round the same way."""
    return Directions(norm, *(part.contiguous() for part in parts))


def _key(W: Float[Tensor, "d h"], query: str) -> str:
    rows = _memory_rows(W).cpu().contiguous()
    layout = f"rows of {'outputs' if _is_transposed(W) else 'inputs'}"
    digest = hashlib.sha256(f"{FORMAT}, {query}, {tuple(W.shape)}, {W.dtype}, {layout}".encode())
    digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sum(key: str, payload: bytes) -> str:
    return hashlib.sha256(key.encode() + payload).hexdigest()


def _is_transposed(W: Float[Tensor, "d h"]) -> bool:
    """Whether the memory of W contains the rows of its transpose."""
    return W.stride(1) != 1 and W.stride(0) == 1


def _memory_rows(W: Float[Tensor, "d h"]) -> Tensor:
    """W or its transpose: the one whose rows are contiguous in memory."""
    return W.mT if _is_transposed(W) else W
