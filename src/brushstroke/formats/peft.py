"""Adapters in PEFT's layout: the only place where factors are called A and B.

A folder holds `adapter_config.json`, `adapter_model.safetensors`, and of ours `brushstroke.json` (the card),
`chat_template.jinja` and a `README.md`. PEFT's lora_A is Uᵀ (r×d), its lora_B is Vᵀ (h×r). No pickle, ever.
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from brushstroke.adapter import Adapter, Card
from brushstroke.errors import AdapterFileError, OutputError, ShapeError
from brushstroke.fetch import (
    CARD,
    CONFIG,
    TENSORS,
    adapter_files,
    damaged_tensors,
    find_adapter,
    read_object,
)
from brushstroke.files import (
    is_being_written,
    output_errors,
    put_back,
    read_json,
    remove_files,
    remove_partial,
    write_folder,
)
from brushstroke.formats.model_card import model_card
from brushstroke.formats.peft_config import Rule, card_from, read_rule, write_config
from brushstroke.formats.peft_forms import Form, closest_form, form_of, parse_key
from brushstroke.formats.templates import TEMPLATE, read_template
from brushstroke.lowrank import Update

README = "README.md"
ADAPTER_FILES = (TENSORS, CONFIG, TEMPLATE, README, CARD)  # in the order in which they are removed
ADAPTER_KEYS = {CONFIG: {"peft_type"}, CARD: {"format", "base_name", "lora"}}  # by which they are told
_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<name>weight|bias)")
_ADDED = re.compile(
    r"\.(lora_|modules_to_save\.|token_adapter\.)"
)  # in the names of what PEFT adds to a base
# What VeLoRA's backward pass and MonteCLoRA's noise need in training; the update is U·V without them.
_TRAINING_STATE = re.compile(r".+\.lora_(velora_embed|monteclora_sampler)(\..+)?")
READ_FILES = (CONFIG, TENSORS, CARD, TEMPLATE)
ATTEMPTS, PAUSE = 40, 0.05  # at reading a folder that another process is replacing, and seconds between them
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter so that brushstroke, PEFT and vLLM load it; all of it or nothing.

    Args:
        adapter: its updates must be of types that PEFT's files can hold.
        folder: made if it is not there.
        overwrite: replace an adapter that the folder holds; files of other names stay.

    Returns:
        The folder.

    Raises:
        AdapterFileError: an update that this format cannot hold, or numbers that are not finite.
        OutputError: the folder holds files already, or a stranger's by our names, or cannot be written.
    """
    folder = Path(folder).expanduser()
    restore(folder)
    if overwrite:
        check_overwrite(folder)
    card = adapter.card or Card()
    updates = _writable(adapter)
    tensors = {}
    for site, (form, update) in updates.items():
        tensors |= {f"base_model.model.{site}.{end}": t for end, t in form.stored(update).items()}
    for name, copy in adapter.copies.items():
        module, _, last = name.rpartition(".")
        inner = ".base_layer" if module in updates else ""
        tensors[f"base_model.model.{module}{inner}.{last}"] = copy.detach().cpu().contiguous()
    sizes = {site: (update.rank, update.scale) for site, (_, update) in updates.items()}
    config = write_config(sizes, card, flags={form.flag for form, _ in updates.values() if form.flag})
    files: dict[str, bytes | str] = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        CARD: json.dumps(card.as_dict(), indent=2, ensure_ascii=False, default=str) + "\n",
        README: model_card(adapter, card, folder.resolve().name),
    }
    if card.chat_template is not None:
        files[TEMPLATE] = card.chat_template
    files[TENSORS] = to_bytes(tensors, metadata={"format": "pt"})
    write_folder(folder, files, owned=ADAPTER_FILES, overwrite=overwrite)
    return folder


def remove(folder: Path) -> None:
    """Remove an adapter's files and every partial one, and the folder where nothing else is in it.

    Raises:
        OutputError: they cannot be removed.
    """
    remove_partial(folder)
    with output_errors(folder):
        remove_files(folder, ADAPTER_FILES)


def load(folder: str | Path) -> Adapter:
    """Read an adapter that brushstroke or PEFT wrote, on the CPU and in the dtype that it was saved in.

    A name such as "owner/name" that is no folder is looked up on the Hugging Face hub. Where another process
    replaces the adapter meanwhile, it is read again: what comes is the old one or the new.

    Raises:
        AdapterFileError: something is missing, unknown, of a wrong shape or not finite; all of it is listed.
            Or it cannot be read, or another process goes on writing.
    """
    folder = find_adapter(folder)
    try:
        for _ in range(ATTEMPTS):
            with suppress(OutputError):  # who may not put files back may still read those that are there
                restore(folder)
            before, failure = _states(folder), None
            try:
                adapter = _load_once(folder)
            except AdapterFileError as error:
                adapter, failure = None, error
            if before == _states(folder):
                if adapter is not None:
                    return adapter
                if failure is not None and not _may_be_written(folder):
                    raise failure
            time.sleep(PAUSE)
    except OSError as error:
        raise AdapterFileError(f"{folder} cannot be read: {error.strerror or error}") from error
    raise AdapterFileError(
        f"another process keeps writing {folder}, or left it half written; load it when that has ended"
    )


def _may_be_written(folder: Path) -> bool:
    return folder.is_dir() and is_being_written(folder, ADAPTER_FILES)


def _states(folder: Path) -> list[tuple[int, ...] | None]:
    """What tells whether the files that are read were replaced."""
    found: list[tuple[int, ...] | None] = []
    for name in READ_FILES:
        try:
            state = os.stat(folder / name)
            found.append((state.st_ino, state.st_mtime_ns, state.st_size))
        except OSError:
            found.append(None)
    return found


def _load_once(folder: Path) -> Adapter:
    config_file, tensor_file = adapter_files(folder)
    stored = read_object(config_file)
    rule = read_rule(stored, str(config_file))
    try:
        tensors = load_file(tensor_file)
    except SafetensorError as error:
        raise damaged_tensors(tensor_file, error) from error
    except (OSError, RuntimeError) as error:  # safetensors says the second where a file cannot be opened
        raise AdapterFileError(f"{tensor_file} cannot be read ({error})") from error
    updates, copies = _contents(tensors, rule, str(tensor_file))
    return Adapter(updates, _read_card(folder, stored, rule, updates), copies=copies)


def restore(folder: Path) -> None:
    """Put back the adapter that a `save` was replacing when it was killed.

    Raises:
        OutputError: its files cannot be moved.
    """
    put_back(folder, TENSORS, ADAPTER_FILES)


def check_overwrite(folder: Path) -> None:
    """Check that every file by a name that `save` uses is an adapter's: what is in them tells, no name alone.

    Raises:
        OutputError: it may be the user's, or another program's.
    """
    told = {name for name, keys in ADAPTER_KEYS.items() if keys <= _keys_in(folder / name)}
    for name in ADAPTER_FILES:
        path = folder / name
        if name in ADAPTER_KEYS:
            known = name in told
        elif name == README:  # PEFT writes one too
            known = CARD in told or (path.is_file() and b"library_name: peft" in path.read_bytes())
        else:
            known = bool(told)
        if os.path.lexists(path) and not (known and path.is_file()):
            raise OutputError(
                f"{path} is not of an adapter, and this one's would replace it; move it, or choose another "
                "folder"
            )


def _keys_in(file: Path) -> set[str]:
    """The keys of a JSON object in a file; none where there is no such thing."""
    try:
        stored = read_json(file)
    except (OSError, ValueError):
        return set()
    return set(stored) if isinstance(stored, dict) else set()


def _writable(adapter: Adapter) -> dict[str, tuple[Form, Any]]:
    updates: dict[str, tuple[Form, Any]] = {}
    problems = []
    update: Any  # every type that has a form has a rank and a scale
    for site, update in adapter.items():
        form = form_of(update)
        if form is None:
            problems.append(f"{site}: this format cannot hold a {type(update).__name__}")
        elif update.rank < 1:
            problems.append(f"{site}: an update of rank 0; leave the site out")
        elif update.dtype not in _DTYPES:
            problems.append(f"{site}: dtype {update.dtype}; convert it with adapter.to(torch.float32)")
        elif not (
            math.isfinite(update.scale * update.rank) and all(map(_is_finite, update.tensors().values()))
        ):
            problems.append(f"{site}: non-finite values; do not keep this adapter")
        else:
            updates[site] = form, update
    flags = {form.flag for form, _ in updates.values()}
    if len(flags) > 1:
        names = ", ".join(sorted({type(update).__name__ for _, update in updates.values()}))
        problems.append(f"it mixes {names}, and PEFT's config has one setting for all sites")
    if problems:
        raise AdapterFileError("this adapter cannot be saved:\n  " + "\n  ".join(problems))
    return updates


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _contents(
    tensors: Mapping[str, Tensor], rule: Rule, where: str
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """The updates, and copies of base weights; every tensor is used, or all faults are listed."""
    problems = []
    parts: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        if _TRAINING_STATE.fullmatch(key):
            continue
        if match := parse_key(key):
            names.add(match["adapter"] or "")
            if tensor.dtype not in _DTYPES or tensor.ndim not in (1, 2):
                problems.append(f"{key}: expected a float matrix; found {tensor.dtype} {tuple(tensor.shape)}")
            elif not _is_finite(tensor):
                problems.append(f"{key}: holds non-finite values")
            else:
                parts.setdefault(match["site"], {})[match["stem"]] = tensor
        elif (match := _COPY.fullmatch(key)) and not _ADDED.search(key) and tensor.is_floating_point():
            copies[f"{match['module']}.{match['name']}"] = tensor
        else:
            problems.append(
                f"{key} {tuple(tensor.shape)}: not part of an update that this version knows{_hint(key)}"
            )
    if len(names) > 1:
        keys = ", ".join(sorted(f"lora_A.{name}.weight" if name else "lora_A.weight" for name in names))
        problems.append(f"it holds several adapters, with keys such as {keys}; save one of them by itself")
    good = {}
    for site, found in parts.items():
        form = closest_form(found)
        reason = _misfit(form, found, rule, site)
        if reason:
            problems.append(f"{site}: {reason}")
        else:
            good[site] = form.read(found, rule.scale_of(site))
    if not (parts or problems):
        problems.append("it holds no factors" if tensors else "it holds no tensors")
    if problems:
        raise AdapterFileError(f"{where} is not a whole low-rank adapter:\n  " + "\n  ".join(problems))
    return good, copies


def _misfit(form: Form, found: Mapping[str, Tensor], rule: Rule, site: str) -> str | None:
    """Why a site's tensors are no update of this form, or None."""
    missing = [stem for stem in form.stems if stem not in found]
    unknown = [stem for stem in found if stem not in form.stems]
    if missing or unknown:
        has = ", ".join(found)
        return f"has {has}, but no (usable) {', '.join(missing)}" if missing else f"cannot have all of {has}"
    if form.flag and not rule.flags.get(form.flag):
        return f"has {', '.join(found)}, but {form.flag} is not set in {CONFIG}"
    if len({tensor.dtype for tensor in found.values()}) > 1:
        return " but ".join(f"{stem} is {tensor.dtype}" for stem, tensor in found.items())
    by_name = {name: (stem, tuple(found[stem].shape)) for stem, name in form.stems.items()}
    rank, (A, A_shape), (B, B_shape) = rule.rank_of(site), by_name["U"], by_name["V"]
    if A_shape[0] != rank or B_shape[-1] != rank or len(A_shape) != 2 or len(B_shape) != 2:
        return (
            f"{A} {A_shape} should be ({rank}, d) and {B} {B_shape} should be (h, {rank}), as {CONFIG} "
            f"gives it rank {rank}"
        )
    try:
        form.read(found, 1.0)
    except ShapeError as error:
        return str(error)
    return None


def _hint(key: str) -> str:
    if "modules_to_save" in key:
        return " (a module that was trained whole, which this version cannot take)"
    if "lora_" in key and not key.startswith("base_model.model."):
        return " (PEFT's keys begin with base_model.model.)"
    return ""


def _read_card(folder: Path, stored: Mapping[str, Any], rule: Rule, updates: Mapping[str, Update]) -> Card:
    file = folder / CARD
    if file.is_file():
        try:
            card = Card.from_dict(read_object(file))
        except AdapterFileError as error:
            raise AdapterFileError(f"{file}: {error}") from error
        _refuse_foreign_card(card, updates, file)
    else:
        card = card_from(stored, rule, updates)
    template = read_template(folder)
    return card if template is None else card.with_changes(chat_template=template)


def _refuse_foreign_card(card: Card, updates: Mapping[str, Update], file: Path) -> None:
    shapes = card.fingerprint.shapes if card.fingerprint else {}
    foreign = [
        f"{site}: {shapes[site]} and {update.shape}"
        for site, update in updates.items()
        if site in shapes and tuple(shapes[site]) != update.shape
    ]
    if foreign:
        raise AdapterFileError(
            f"{file} belongs to another adapter (shapes of the base there, and of the update here):\n  "
            + "\n  ".join(foreign)
            + f"\ndelete {CARD} to load the adapter without a card"
        )
