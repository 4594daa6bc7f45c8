"""The singular directions of base weights, which no adapter changes, and a cache that keeps them.

It knows no adapter and reads no weight's file: a weight is known by the content of its tensor.
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
from brushstroke.files import write_file
from brushstroke.lowrank.cosines import proven_floor
from brushstroke.lowrank.krylov import Shifted, dense_svd, top_svd
from brushstroke.samples.assets import cache_folder

STEP = 40  # strongest directions of a large W come in multiples of this, so that all questions share them
SMALLEST = 2**16  # entries of a W that is worth a file
LIMIT = 4 * 2**30  # bytes of all files
LARGEST = 1e18  # norm of a W whose products with WᵀW are in the range of float32
FORMAT = "brushstroke directions 1"  # another one wherever the maths or the layout changes
_SUFFIX = ".directions"


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular directions of one W, strongest first.

    Args:
        norm: ‖W‖_F.
        left: input directions, in columns.
        sigma: descending.
        right: output directions, in rows.
        residual: ‖Wᵀ·left_i − sigma_i·right_i‖ of each; 0 where W was decomposed whole.
    """

    norm: float
    left: Float[Tensor, "d k"]
    sigma: Float[Tensor, " k"]
    right: Float[Tensor, "k h"]
    residual: Float[Tensor, " k"]

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        found = {name: getattr(self, name) for name in ("left", "sigma", "right", "residual")}
        return {**found, "norm": torch.tensor(self.norm, dtype=torch.float64)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Directions":
        """The inverse of `tensors`."""
        parts = dict(tensors)
        return cls(norm=float(parts.pop("norm")), **parts)


class Working:
    """W in the dtype that it is multiplied in: float64 where it is decomposed whole, otherwise float32.

    Weights in half precision are converted into one piece of memory that is used again for the next, which is
    many times faster than fresh memory for each. So a result is good until the next call.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def __call__(self, W: Float[Tensor, "d h"], whole: bool) -> Float[Tensor, "d h"]:
        """W itself where it has the dtype already."""
        if whole or W.dtype in (torch.float64, torch.float32):
            return W.double() if whole else W
        if self._room.numel() < W.numel() or self._room.device != W.device:
            self._room = torch.empty(W.numel(), device=W.device)
        rows = _as_it_lies(W)
        copied = self._room[: W.numel()].view(rows.shape).copy_(rows)
        return copied.mT if _turned(W) else copied


class DirectionCache:
    """Directions of weights in a folder, one file a weight, by the content of the weight and what was asked.

    A file appears whole or not at all. One that is damaged, or is not what its name says, is as none. The
    files of all bases together stay below a limit: the ones that were not used for longest go, and where all
    that are left belong to this run, no more are kept.

    Args:
        folder: by default `directions` in the cache folder (`BRUSHSTROKE_CACHE`, or ~/.cache/brushstroke).
        limit: of all files, in bytes.
    """

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder or cache_folder() / "directions", limit
        self.used = self.kept = 0  # how many weights' directions came from files, and how many files are new
        self.failure = ""  # why nothing can be kept
        self._mine: set[Path] = set()

    def find(self, key: str) -> dict[str, Tensor] | None:
        """What the file of a key holds."""
        import safetensors.torch

        path = self._path(key)
        try:
            told, payload = path.read_bytes().split(b"\n", 1)
            if told.decode() != _sum(key, payload):
                return None
            found = safetensors.torch.load(payload)
        except Exception:  # none, or damaged in whatever way: it is computed anew and replaced
            return None
        self._mine.add(path)
        with suppress(OSError):
            os.utime(path)
        return found

    def keep(self, key: str, found: dict[str, Tensor]) -> None:
        """Write the file of a key, unless there is no room for it or no permission."""
        import safetensors.torch

        payload = safetensors.torch.save({name: tensor.cpu() for name, tensor in found.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._make_room(len(payload)):
                write_file(self._path(key), _sum(key, payload).encode() + b"\n" + payload)
                self._mine.add(self._path(key))
                self.kept += 1
        except (OutputError, OSError) as error:
            self.failure = str(error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _make_room(self, size: int) -> bool:
        """Whether a file of this size fits, once the oldest ones that this run has not used are gone."""
        files = {path: path.stat() for path in self.folder.glob(f"*{_SUFFIX}")}
        total = size + sum(stat.st_size for stat in files.values())
        for path in sorted(files.keys() - self._mine, key=lambda path: files[path].st_mtime):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= files[path].st_size
        return total <= self.limit


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
    """At least the k strongest singular directions of W, from the cache where it has them.

    Args:
        site: the name of W, for errors.
        W: in the dtype of its file.
        k: how many; rounded up to a multiple of 40, so that questions with several k share one result.
        whole: decompose W whole, in float64, and give all of its directions.
        seed: of the Krylov start.
        cache: where they are looked for, and kept.
        working: what converts W.

    Raises:
        BaseLoadError: W holds NaN or infinity, or is larger than any weight of a model that works.
    """
    k = -(-max(k, 1) // STEP) * STEP
    kept, keep = _cached(cache, W, "whole" if whole else f"{k} from {seed}")
    if kept is not None and cache is not None:
        cache.used += 1
        return Directions.of(kept)
    norm, work = finite_norm(site, W), (working or Working())(W, whole)
    if norm > LARGEST and work.dtype == torch.float32:
        raise BaseLoadError(f"{site}: the norm of W is {norm:.1g}; its square is too large for float32")
    if whole:
        parts = dense_svd(work)
        found = _laid_out(norm, *parts, torch.zeros_like(parts.sigma))
    else:
        top = top_svd(Shifted(work), k, generator=torch.Generator().manual_seed(seed))
        found = _laid_out(norm, top.left, top.sigma, top.right, top.residual)
    keep(found.tensors())
    return found


def base_floor(
    W: Float[Tensor, "d h"], strongest: float, working: Working, cache: DirectionCache | None = None
) -> float:
    """The share of sigma₁ below which W (d ≤ h) has no singular value, from the cache where it has it.

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
    """What the cache has for a question about W, and the function that keeps the answer otherwise."""
    if cache is None or W.numel() < SMALLEST:
        return None, lambda found: None
    key = _key(W, asked)
    return cache.find(key), partial(cache.keep, key)


def _laid_out(norm: float, *parts: Tensor) -> Directions:
    """Directions with the memory as a file gives it, so that products with them round alike."""
    return Directions(norm, *(part.contiguous() for part in parts))


def _key(W: Float[Tensor, "d h"], asked: str) -> str:
    rows = _as_it_lies(W).cpu().contiguous()
    told = f"{FORMAT}, {asked}, {tuple(W.shape)}, {W.dtype}, rows of {'outputs' if _turned(W) else 'inputs'}"
    digest = hashlib.sha256(told.encode())
    digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sum(key: str, payload: bytes) -> str:
    return hashlib.sha256(key.encode() + payload).hexdigest()


def _turned(W: Float[Tensor, "d h"]) -> bool:
    """Whether the memory of W holds its transpose row by row."""
    return W.stride(1) != 1 and W.stride(0) == 1


def _as_it_lies(W: Float[Tensor, "d h"]) -> Tensor:
    return W.mT if _turned(W) else W
