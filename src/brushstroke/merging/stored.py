"""Finds the dtypes of the weights in a model's files from the files' headers, not from its config.

It reads no numbers.
"""

from pathlib import Path

import torch

from brushstroke.base import quiet_transformers
from brushstroke.errors import BaseLoadError
from brushstroke.hub import hub_or_cache
from brushstroke.merging.shards import DTYPE_NAMES, Header
from brushstroke.merging.side_files import loaded_files

_PATTERNS = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin*"])


def stored_dtypes(folder: Path) -> frozenset[torch.dtype]:
    """The floating-point dtypes of the tensors in the files from which transformers loads a folder's weights.

    Raises:
        BaseLoadError: a file is damaged.
    """
    files = [folder / name for name in loaded_files(folder) if not name.endswith(".json")]
    return frozenset(dtype for file in files for dtype in _dtypes(file))


def widest_dtype(name: str, folder: Path | None) -> str:
    """The name of the dtype that holds every number of a base's files as it is; float32 where none is known.

    Args:
        name: the base: a folder, a `.gguf` file or a hub id, of which the files are fetched.
        folder: where the name is that of a folder.
    """
    place = folder if folder is not None or name.endswith(".gguf") else _fetched(name)
    dtypes = stored_dtypes(place) if place is not None else frozenset()
    if len(dtypes) == 1:
        return str(next(iter(dtypes))).removeprefix("torch.")
    return "float64" if torch.float64 in dtypes else "float32"


def _dtypes(file: Path) -> set[torch.dtype]:
    known = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    try:
        if file.suffix == ".safetensors":
            entries = Header.read(file).entries
            return {known[e["dtype"]] for e in entries.values() if e.get("dtype") in known}
        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {x.dtype for x in tensors.values() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    except Exception as error:  # a damaged file can make its reader raise anything
        raise BaseLoadError(f"{file} is damaged ({error}); fetch it again") from error


def _fetched(name: str) -> Path | None:
    """The folder of a hub id's weights; None after an error, which `load_base` then reports better."""
    from huggingface_hub import snapshot_download

    for patterns in _PATTERNS:
        try:
            with quiet_transformers(), hub_or_cache():
                folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception:
            return None
        if loaded_files(folder):
            return folder
    return None
