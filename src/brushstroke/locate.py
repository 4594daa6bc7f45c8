"""Finds a base: a folder, a GGUF file, or a model on the Hugging Face hub.

It loads no model, and imports neither torch nor transformers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brushstroke.errors import BaseLoadError
from brushstroke.files import read_json
from brushstroke.hub import hub_or_cache, is_cached

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".ckpt")


def require_base_files(name: str) -> None:
    """Check that a base of this name can be found; fast for local files.

    Raises:
        BaseLoadError: there is no such file or folder, it holds no model, or the hub cannot be reached.
    """
    with hub_if_needed(name, locate_base(name)):
        pass


def stored_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor key → shape, from the headers of a folder's safetensors files.

    Empty for hub ids, GGUF files, other formats, incomplete folders, and quantised weights.

    Raises:
        BaseLoadError: the folder holds no weights, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    folder = locate_base(name)
    if folder is None or not folder.is_dir():
        return {}
    if not any(entry.suffix in WEIGHTS for entry in folder.iterdir()):
        raise BaseLoadError(f"{folder} has a config.json but no weights; fetch the folder again")
    if "quantization_config" in (folder / "config.json").read_text("utf-8", errors="replace"):
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BaseLoadError(f"{path} is damaged ({error}); fetch the file again") from error
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; empty if one is missing or their index is damaged."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        named = set(read_json(index)["weight_map"].values()) if index.is_file() else {single.name}
        files = [folder / name for name in sorted(named)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return files if all(file.is_file() for file in files) else []


def locate_base(name: str) -> Path | None:
    """The folder or GGUF file of a name, or None for a hub id.

    Raises:
        BaseLoadError: there is no such file or folder, or it holds no model.
    """
    if not name:
        raise BaseLoadError("the name of the base is empty; give a model folder, a hub id or a .gguf file")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise BaseLoadError(
                f"{name} is a file of an unknown kind; a base is a model folder, a hub id or a .gguf file"
            )
        return path
    if path.is_dir():
        return _model_in(path)
    separators = name.count("/") + name.count(os.sep) * (os.sep != "/")
    if separators > 1 or name.startswith((".", "~", "/")) or name.endswith((".gguf", "/")):
        raise BaseLoadError(f"there is no file or folder {name!r}; check the path, or give a hub id")
    return None


def _model_in(folder: Path) -> Path:
    files = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in files:
        raise BaseLoadError(
            f"{folder} holds an adapter, not a base model; give the base that it was trained on in its "
            "place, and the adapter separately"
        )
    if "config.json" in files:
        return folder
    packed = sorted(name for name in files if name.endswith(".gguf"))
    if len(packed) == 1:
        return folder / packed[0]
    if packed:
        raise BaseLoadError(f"{folder} holds {len(packed)} GGUF files; name one of them: {', '.join(packed)}")
    raise BaseLoadError(
        f"{folder} holds no model: expected config.json with weights, or one .gguf file; "
        f"found {', '.join(sorted(files)[:8]) or 'nothing'}"
    )


@contextmanager
def hub_if_needed(name: str, source: Path | None, revision: str | None = None) -> Iterator[None]:
    """Context manager: if the hub cannot be reached, a hub id is read from the cache.

    Args:
        name: the base, as the user named it.
        source: the result of `locate_base`.
        revision: branch, tag or commit of a hub id.

    Raises:
        BaseLoadError: the cache does not have it either (the hub's own clients would try for a minute).
    """
    if source is not None:
        yield
        return
    with hub_or_cache() as unreachable:
        if unreachable and not is_cached(name, revision):
            raise BaseLoadError(
                f"there is no folder {name!r}, the cache of the Hugging Face hub has no such model, and the "
                f"hub cannot be reached ({unreachable}); check the spelling and the network"
            )
        yield
