"""Finds the files of an adapter on disk or fetches them from the hub, and reads shapes from their headers.

It reads no tensors, and loads neither torch nor transformers.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from brushstroke.errors import AdapterFileError
from brushstroke.files import read_json
from brushstroke.hub import hub_or_cache
from brushstroke.outputs import OpenFolder, open_folder

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "brushstroke.json"
PICKLE = "adapter_model.bin"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer_config.json")
FETCHED = (CONFIG, TENSORS, CARD, *TEMPLATES)
PATIENCE = 2.0  # seconds to wait for the hub's first answer; after that, the cache is used
_FACTOR = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(embedding_)?(?P<factor>[AB])(\.[^.]+){0,2}")
_EXPECTED = f"an adapter is a folder with {CONFIG} and {TENSORS}, or a hub id (owner/name)"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter: a local one, or the cached files of a hub id such as "owner/name".

    A file or folder of this name on disk takes precedence. If the hub does not answer, cached files of an
    earlier fetch are used.

    Raises:
        AdapterFileError: it is not on disk, on the hub or in the cache.
    """
    path = Path(name).expanduser()
    text = name.as_posix() if isinstance(name, Path) else name
    return path if os.path.lexists(path) or not _ID.fullmatch(text) else _fetch(text)


@contextmanager
def open_adapter(name: str | Path) -> Iterator[OpenFolder]:
    """Context manager: the folder of an adapter; if it is replaced inside the block, the old files are read.

    Raises:
        AdapterFileError: see `find_adapter`, or a file in it cannot be read.
    """
    folder = find_adapter(name)
    try:
        with ExitStack() as stack:
            try:
                opened = stack.enter_context(open_folder(folder))
            except FileNotFoundError as error:
                raise AdapterFileError(f"there is no folder {folder}; {_EXPECTED}") from error
            yield opened
    except OSError as error:
        inner = str(error.filename or folder)  # files in it are opened relative to it
        file = folder if inner == str(folder) else folder / inner
        raise AdapterFileError(f"{file} cannot be read: {error.strerror or error}") from error


def adapter_files(folder: OpenFolder) -> tuple[OpenFolder, OpenFolder]:
    """The config file and the tensor file of an adapter's folder.

    Raises:
        AdapterFileError: it is not a folder, or lacks one of them.
    """
    config, tensors = folder / CONFIG, folder / TENSORS
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file; {_EXPECTED}")
    if not config.is_file():
        inner = [entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file()]
        hint = f"; its sub-folder {inner[0]} has one: name that" if len(inner) == 1 else ""
        hint = f"; its sub-folders {', '.join(inner)} have one: name one of them" if len(inner) > 1 else hint
        raise AdapterFileError(f"{folder} has no {CONFIG}, so it is no adapter{hint}")
    if not tensors.is_file():
        pickled = (folder / PICKLE).is_file()
        hint = (
            f"it has {PICKLE}, a pickle, which is never read: load it in PEFT and save it again"
            if pickled
            else "the run that writes it has not finished, or the copy is incomplete"
        )
        raise AdapterFileError(f"{folder} has no {TENSORS}; {hint}")
    return config, tensors


def read_object(file: Traversable) -> dict[str, Any]:
    """The JSON object in a file of an adapter.

    Raises:
        AdapterFileError: it does not hold one JSON object.
        OSError: it cannot be read; `open_adapter` reports it.
    """
    try:
        stored = read_json(file)
        json.dumps(stored, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    except ValueError as error:
        raise AdapterFileError(f"{file} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(stored, dict):
        raise AdapterFileError(f"{file} must hold one JSON object; it holds a {type(stored).__name__}")
    return stored


def adapter_shapes(name: str | Path) -> dict[str, tuple[int, int]]:
    """Site → (d, h) of an adapter, from its headers; empty for damaged files and formats other than PEFT's.

    `load` reads other formats and reports damage. Sites with wrong factors are left out here.

    Raises:
        AdapterFileError: there is no adapter of that name.
    """
    from safetensors import SafetensorError, safe_open

    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    with open_adapter(name) as folder:
        if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
            return {}
        try:
            with safe_open(str(folder / TENSORS), framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    if match := _FACTOR.fullmatch(key):
                        sides.setdefault(match["site"], {})[match["factor"]] = file.get_slice(key).get_shape()
        except SafetensorError:
            return {}
    whole = {site: (pair["A"], pair["B"]) for site, pair in sides.items() if len(pair) == 2}
    return {site: (A[1], B[0]) for site, (A, B) in whole.items() if len(A) == len(B) == 2 and A[0] == B[1]}


def _fetch(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    failure: Exception | None = None
    with _quiet(), hub_or_cache() as unreachable:
        try:
            listed = HfApi().model_info(name, timeout=PATIENCE).siblings
        except Exception as error:  # no network, offline mode, or no such model: the cache may have it
            failure, listed = error, None
        if listed:
            _check_listed(name, {entry.rfilename for entry in listed})
        try:
            folder = Path(
                snapshot_download(name, allow_patterns=[*FETCHED], local_files_only=failure is not None)
            )
        except Exception as error:
            cause = failure or error
            if isinstance(cause, RepositoryNotFoundError):
                found = (
                    "the Hugging Face hub has no model of that name, or a private one (log in: hf auth login)"
                )
            else:
                reason = unreachable or " ".join(str(cause).split())[:160] or type(cause).__name__
                found = f"the Hugging Face hub cannot be reached ({reason})"
            raise AdapterFileError(
                f"there is no folder {name}, and {found}; check the name and the network"
            ) from error
    return folder


def _check_listed(name: str, files: set[str]) -> None:
    lacking = next((file for file in (CONFIG, TENSORS) if file not in files), None)
    if lacking is None:
        return
    inner = sorted(file.removesuffix(f"/{CONFIG}") for file in files if file.endswith(f"/{CONFIG}"))
    hint = "so it is no adapter"
    if lacking == TENSORS and PICKLE in files:
        hint = f"but {PICKLE}, a pickle, which is never read: load it in PEFT and save it again"
    elif inner:
        hint = f"but adapters in {', '.join(inner[:6])}: download the one and give its folder"
    raise AdapterFileError(f"{name} on the Hugging Face hub has no {lacking}, {hint}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: the hub's client shows no progress bars and logs only errors."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    bars, level = not are_progress_bars_disabled(), logging.get_verbosity()
    if bars:
        disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        if bars:
            enable_progress_bars()
        logging.set_verbosity(level)
