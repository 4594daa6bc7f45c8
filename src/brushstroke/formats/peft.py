"""Adapters in PEFT's layout: the only place where factors are called A and B.

A folder holds `adapter_config.json` and `adapter_model.safetensors`; brushstroke adds `brushstroke.json` (the
card), `chat_template.jinja` and a `README.md`. PEFT's lora_A is Uᵀ (r×d), its lora_B is Vᵀ (h×r). It never
reads or writes a pickle.
"""

import json
import math
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor

from brushstroke.adapter import Adapter, Card
from brushstroke.errors import AdapterFileError
from brushstroke.fetch import (
    CARD,
    CONFIG,
    TENSORS,
    adapter_files,
    open_adapter,
    read_object,
)
from brushstroke.files import read_tensors
from brushstroke.formats.model_card import model_card
from brushstroke.formats.peft_config import Rule, card_from, read_rule, write_config
from brushstroke.formats.peft_forms import Form, axis_counts, closest_form, form_of, forms_of, parse_key
from brushstroke.formats.templates import TEMPLATE, read_template
from brushstroke.lowrank import Update
from brushstroke.outputs import (
    OwnFiles,
    clear_leftovers,
    has_keys,
    refuse_existing,
    refuse_other_process,
    remove_own,
    replace_files,
)

README = "README.md"
METRICS, RUN = "metrics.jsonl", "run.json"  # a training run writes the second with its adapter
ADAPTER_FILES = (TENSORS, CONFIG, TEMPLATE, README, CARD)  # in the order in which they are removed
ADAPTER_KEYS = {CONFIG: has_keys("peft_type"), CARD: has_keys("format", "base_name", "lora")}
OWN_FILES = OwnFiles(  # PEFT's too
    ADAPTER_FILES, ADAPTER_KEYS, (CONFIG, CARD), {README: (CARD,)}, {README: "library_name: peft"}
)
_COPY = re.compile(r"base_model\.model\.(?P<module>.+?)(\.base_layer)?\.(?P<name>weight|bias)")
_ADDED = re.compile(
    r"\.(lora_|modules_to_save\.|token_adapter\.)"
)  # in the names of what PEFT adds to a base
# What VeLoRA's backward pass and MonteCLoRA's noise need in training; the update is U·V without them.
_TRAINING_STATE = re.compile(r".+\.lora_(velora_embed|monteclora_sampler)(\..+)?")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UnfinishedRunWarning(UserWarning):
    """The folder of an adapter has the metrics of a run that has not finished: it is not the run's result."""


def save(adapter: Adapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write an adapter in PEFT's layout; all of it or nothing.

    The written `README.md` says whether PEFT can load it (not if its type is LoRA and PEFT's LoRA lacks a key
    of its updates), and whether vLLM can: only LoRA with one scale for all sites.

    Args:
        adapter: its updates must be of types that PEFT's files can hold.
        folder: created if it does not exist.
        overwrite: replace the adapter in the folder; files with other names stay.

    Returns:
        The folder.

    Raises:
        AdapterFileError: an update that this format cannot hold, or numbers that are not finite.
        OutputError: the folder is not empty, has files of these names that another program wrote, or cannot
            be written; or a run of another process is writing to it.
    """
    folder = Path(folder).expanduser()
    check_output(folder, overwrite)
    if _has_unfinished_run(folder):
        refuse_other_process(folder)
    files = as_files(adapter, folder.resolve().name)
    replace_files(folder, files, last=TENSORS, owned=ADAPTER_FILES)
    return folder


def as_files(adapter: Adapter, name: str) -> dict[str, bytes | str]:
    """The files of an adapter in PEFT's layout: file name → content; `save` writes them to a folder.

    Args:
        adapter: its updates must be of types that PEFT's files can hold.
        name: the folder's name, for the model card.

    Raises:
        AdapterFileError: an update that this format cannot hold, or numbers that are not finite.
    """
    card = adapter.card or Card()
    updates = require_savable(adapter)
    tensors = {}
    for site, (form, update) in updates.items():
        tensors |= {f"base_model.model.{site}.{end}": t for end, t in form.stored(update).items()}
    for copied, copy in adapter.copies.items():
        module, _, last = copied.rpartition(".")
        inner = ".base_layer" if module in updates else ""
        tensors[f"base_model.model.{module}{inner}.{last}"] = copy.detach().cpu().contiguous()
    sizes = {site: (form.rank_of(update), form.scale_of(update)) for site, (form, update) in updates.items()}
    config = write_config(sizes, card, {site: form for site, (form, _) in updates.items()})
    files: dict[str, bytes | str] = {
        CONFIG: json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n",
        CARD: json.dumps(card.as_dict(), indent=2, ensure_ascii=False, default=str) + "\n",
        README: model_card(adapter, card, name),
        TENSORS: to_bytes(tensors, metadata={"format": "pt"}),
    }
    return files if card.chat_template is None else {**files, TEMPLATE: card.chat_template}


def check_output(folder: Path, overwrite: bool) -> None:
    """Check that an adapter may be written to a folder, and remove leftovers of a killed `save` next to it.

    Raises:
        OutputError: it holds files and `overwrite` is false, or another program wrote files of these names.
    """
    clear_leftovers(folder, ADAPTER_FILES.__contains__)
    refuse_existing(folder, overwrite)
    OWN_FILES.refuse_foreign(folder)


def remove(folder: Path) -> None:
    """Remove an adapter's files in one step, and the folder if it is then empty.

    Raises:
        OutputError: they cannot be removed.
    """
    clear_leftovers(folder, ADAPTER_FILES.__contains__)
    remove_own(folder, ADAPTER_FILES)


def load(folder: str | Path) -> Adapter:
    """Read an adapter that brushstroke or PEFT wrote, on the CPU and in the dtype that it was saved in.

    If a name such as "owner/name" is not a folder, it is looked up on the Hugging Face hub. If another
    process replaces the adapter meanwhile, the result is the complete old or the complete new one.

    Raises:
        AdapterFileError: something is missing, unknown, of a wrong shape or not finite; all of it is listed.
            Or it cannot be read.
    """
    with open_adapter(folder) as opened:
        config_file, tensor_file = adapter_files(opened)
        _warn_of_run(opened)
        stored = read_object(config_file)
        rule = read_rule(stored, str(config_file))
        try:
            tensors = read_tensors(tensor_file.read_bytes())
        except SafetensorError as error:
            raise AdapterFileError(
                f"{tensor_file} is damaged ({error}); copy it again from its source"
            ) from error
        updates, copies = _contents(tensors, rule, str(tensor_file))
        return Adapter(updates, _read_card(opened, stored, rule, updates), copies=copies)


def _warn_of_run(opened: Traversable) -> None:
    if _has_unfinished_run(opened):
        warnings.warn(
            f"{opened} has the metrics of a training run that has not finished (there is no {RUN}), and the "
            f"adapter there is not its result; finish the run, or remove {METRICS}",
            UnfinishedRunWarning,
            stacklevel=4,
        )


def _has_unfinished_run(folder: Traversable) -> bool:
    """Whether a folder has the metrics of a run, but not the file that a run writes at its end."""
    first = b""
    with suppress(OSError), (folder / METRICS).open("rb") as file:
        first = file.readline()
    return b'"real_tokens"' in first and not (folder / RUN).is_file()


def require_savable(adapter: Adapter) -> dict[str, tuple[Form, Update]]:
    """Check that `save` can write an adapter; returns the form and the update of each site.

    Raises:
        AdapterFileError: an update that this format cannot hold, or numbers that are not finite.
    """
    updates: dict[str, tuple[Form, Update]] = {}
    problems = []
    for site, update in adapter.items():
        form = form_of(update)
        if form is None:
            problems.append(f"{site}: this format cannot hold a {type(update).__name__}")
        elif (rank := form.rank_of(update)) < 1:
            problems.append(f"{site}: an update of rank 0; leave the site out")
        elif update.dtype not in _DTYPES:
            problems.append(f"{site}: dtype {update.dtype}; convert it with adapter.to(torch.float32)")
        elif not (
            math.isfinite(form.scale_of(update) * rank) and all(map(_is_finite, update.tensors().values()))
        ):
            problems.append(f"{site}: non-finite values; do not keep this adapter")
        else:
            updates[site] = form, update
    settings = {(form.peft_type, form.flag) for form, _ in updates.values()}
    if len(settings) > 1:
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
    keys: dict[str, list[str]] = {}  # of each site
    copies: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, tensor in tensors.items():
        if _TRAINING_STATE.fullmatch(key):
            continue
        if match := parse_key(key):
            names.add(match["adapter"] or "")
            axes = axis_counts(match["stem"])
            if tensor.dtype not in _DTYPES or tensor.ndim not in axes:
                problems.append(
                    f"{key}: expected floats with {' or '.join(map(str, sorted(axes)))} axes; found "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
            elif not _is_finite(tensor):
                problems.append(f"{key}: holds non-finite values")
            else:
                parts.setdefault(match["site"], {})[match["stem"]] = tensor
                keys.setdefault(match["site"], []).append(key)
        elif (match := _COPY.fullmatch(key)) and not _ADDED.search(key) and tensor.is_floating_point():
            copies[f"{match['module']}.{match['name']}"] = tensor
        else:
            problems.append(
                f"{key} {tuple(tensor.shape)}: not part of an update that this version knows{_hint(key)}"
            )
    if len(names) > 1:
        shown = ", ".join(sorted(f"lora_A.{name}.weight" if name else "lora_A.weight" for name in names))
        problems.append(
            f"it holds several adapters, with keys such as {shown}; save each of them to a separate folder"
        )
    good = {}
    for site, found in parts.items():
        forms = forms_of(rule.peft_type)
        form = closest_form(found, [form for form in forms if rule.allows(form, site)] or forms)
        if reason := _misfit(form, found, rule, site, ", ".join(keys[site])):
            problems.append(f"{site}: {reason}")
        else:
            good[site] = form.read(found, rule.scale_of(site))
    if not (parts or problems):
        problems.append("it holds no factors" if tensors else "it holds no tensors")
    if problems:
        raise AdapterFileError(f"{where} is not a whole low-rank adapter:\n  " + "\n  ".join(problems))
    return good, copies


def _misfit(form: Form, found: Mapping[str, Tensor], rule: Rule, site: str, keys: str) -> str | None:
    """Why a site's tensors are not an update of this form, or None if they are."""
    missing = [stem for stem in form.axes if stem not in found]
    if missing:
        return f"has {keys}, but no (usable) {', '.join(missing)}"
    if any(stem not in form.axes for stem in found):
        return f"cannot have all of {keys}"
    wrong = [flag for flag, on in rule.flags.items() if on != (flag == form.flag)]
    if wrong:
        return f"has {keys}, but {CONFIG} says {wrong[0]}: {str(rule.flags[wrong[0]]).lower()}"
    if len({tensor.dtype for tensor in found.values()}) > 1:
        return " but ".join(f"{stem} is {tensor.dtype}" for stem, tensor in found.items())
    rank, lists = rule.rank_of(site), rule.describe_lists(site)
    if not _shapes_fit(form.axes, found, rank):
        shapes = [
            f"{stem} {tuple(found[stem].shape)} should be "
            f"({', '.join(str(rank) if axis == 'r' else axis for axis in axes)})"
            for stem, axes in form.axes.items()
        ]
        return f"{' and '.join(shapes)}, as {CONFIG} gives it rank {rank}{lists and f' and {lists}'}"
    if not rule.allows(form, site):
        return f"has {keys}, but in {CONFIG} {lists}"
    return None


def _shapes_fit(axes: Mapping[str, list[str]], found: Mapping[str, Tensor], rank: int) -> bool:
    """Whether each axis of a name has one size in all tensors, r the rank."""
    sizes = {"1": 1, "r": rank}
    return all(
        len(names) == found[stem].ndim
        and all(
            sizes.setdefault(name, size) == size for name, size in zip(names, found[stem].shape, strict=True)
        )
        for stem, names in axes.items()
    )


def _hint(key: str) -> str:
    if "modules_to_save" in key:
        return " (a fully trained module, which this version does not support)"
    if "lora_" in key and not key.startswith("base_model.model."):
        return " (PEFT's keys begin with base_model.model.)"
    return ""


def _read_card(
    folder: Traversable, stored: Mapping[str, Any], rule: Rule, updates: Mapping[str, Update]
) -> Card:
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


def _refuse_foreign_card(card: Card, updates: Mapping[str, Update], file: Traversable) -> None:
    shapes = card.fingerprint.shapes if card.fingerprint else {}
    foreign = [
        f"{site}: {shapes[site]} and {update.shape}"
        for site, update in updates.items()
        if site in shapes and not update.fits(shapes[site])
    ]
    if foreign:
        raise AdapterFileError(
            f"{file} belongs to another adapter (shapes of the base there, and of the update here):\n  "
            + "\n  ".join(foreign)
            + f"\ndelete {CARD} to load the adapter without a card"
        )
