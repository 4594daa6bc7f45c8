"""Adapters on the Hugging Face hub: their files, fetched into the hub client's cache.

It reads none of them, and loads neither torch nor transformers.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brushstroke.errors import AdapterFileError
from brushstroke.hub import hub_or_cache

CONFIG, TENSORS, CARD = "adapter_config.json", "adapter_model.safetensors", "brushstroke.json"
PICKLE = "adapter_model.bin"
TEMPLATES = ("chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer_config.json")
FETCHED = (CONFIG, TENSORS, CARD, *TEMPLATES)
PATIENCE = 2.0  # seconds for the hub's first answer; then the cache must do
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_adapter(name: str | Path) -> Path:
    """The folder of an adapter: a local one, or the cached files of a hub id such as "owner/name".

    What is there by this name on the disk wins. Where the hub does not answer, files of an earlier fetch are
    taken.

    Raises:
        AdapterFileError: neither the disk, nor the hub, nor the cache has it.
    """
    path = Path(name).expanduser()
    text = name.as_posix() if isinstance(name, Path) else name
    return path if os.path.lexists(path) or not _ID.fullmatch(text) else _fetch(text)


def _fetch(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    failure: Exception | None = None
    with _quiet(), hub_or_cache() as unreachable:
        try:
            listed = HfApi().model_info(name, timeout=PATIENCE).siblings
        except Exception as error:  # no network, none wanted, or no such model: the cache may have it
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
                said = unreachable or " ".join(str(cause).split())[:160] or type(cause).__name__
                found = f"the Hugging Face hub cannot be asked ({said})"
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
    """Context manager: the hub's client draws no progress bars and logs errors only."""
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
