"""Describes how PEFT's files store each type of update: tensor names, and the field of the config.

A new type of update is one entry in `FORMS`. It reads and writes no files.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from brushstroke.layers.dora import DoRA
from brushstroke.layers.embedding import EmbeddingLowRank
from brushstroke.lowrank import LowRank, Update

LORA = "LORA"


@dataclass(frozen=True)
class Form:
    """One type of update in PEFT's files.

    Args:
        update: the type; called with its tensors by name, and with `scale` if it has a scale that is not a
            tensor.
        tensors: name of a tensor in `Update.tensors()` → (end of its key in the file, its axes there). An
            axis is a name (r is the rank), or 1 if the update does not have it. The update has the named
            axes in the reverse order: a matrix is stored transposed.
        flag: the boolean field of `adapter_config.json` that is true for this type.
        peft_type: what that file calls the type.
        fields: names of fields that differ from LoRA's: name there → name for LoRA. LoHa has
            {"alpha": "lora_alpha", "init_weights": "init_lora_weights"}.
        constants: further fields that PEFT needs for this type: name → the value to write. In a file that is
            read they may have any value, so name no field that changes what the tensors mean.
        lists_sites: the field that lists the sites of this form, such as "feedforward_modules" of IA3. In a
            file with this field, the listed sites have this form, and no others.

    The config has a rank and alpha if a form of its type has the axis r or a scale. For an update without
    this axis, the rank is the constant "r", or 1.
    """

    update: Callable[..., Update]
    tensors: Mapping[str, tuple[str, str]]
    flag: str | None = None
    peft_type: str = LORA
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    lists_sites: str | None = None

    @property
    def is_in_peft(self) -> bool:
        """Whether PEFT can have such files: of another type, or with keys that PEFT's LoRA has."""
        return self.peft_type != LORA or {end for end, _ in self.tensors.values()} <= _ENDS

    @property
    def names(self) -> dict[str, str]:
        """The first part of each key's end, such as "lora_A" → the name of the tensor."""
        return {_stem(end): name for name, (end, _) in self.tensors.items()}

    @property
    def axes(self) -> dict[str, list[str]]:
        """The first part of each key's end → the axes of the tensor in the file."""
        return {_stem(end): axes.split() for end, axes in self.tensors.values()}

    @property
    def needs_rank(self) -> bool:
        """Whether the config must have a rank and alpha: for the axis r of a tensor, or for a scale."""
        return self._has_scale or any("r" in axes for axes in self.axes.values())

    def rank_of(self, update: Update) -> int:
        """The rank for the config."""
        for name, (_, axes) in self.tensors.items():
            if "r" in axes.split():
                return _in_file(update.tensors()[name], axes.split()).shape[axes.split().index("r")]
        return self.constants.get("r", 1)

    def scale_of(self, update: Update) -> float:
        """The scale for the config; 1 if the update has none."""
        return getattr(update, "scale", 1.0) if self._has_scale else 1.0

    def stored(self, update: Update) -> dict[str, Tensor]:
        """End of the key → tensor as stored in the file: on the CPU, contiguous, in its own memory."""
        tensors = {name: tensor.detach().cpu() for name, tensor in update.tensors().items()}
        rows = torch.contiguous_format
        return {
            end: _in_file(tensors[name], axes.split()).clone(memory_format=rows)
            for name, (end, axes) in self.tensors.items()
        }

    def read(self, found: Mapping[str, Tensor], scale: float) -> Update:
        """The update of the tensors found in a file, by the first parts of their keys' ends."""
        tensors = {name: _from_file(found[stem], self.axes[stem]) for stem, name in self.names.items()}
        # Uᵀ and V in rows, as the layers use them: U stays a view.
        kept = {name: t if name == "U" else t.contiguous() for name, t in tensors.items()}
        return self.update(**kept, **({"scale": scale} if self._has_scale else {}))

    @property
    def _has_scale(self) -> bool:
        return "scale" in inspect.signature(self.update).parameters and "scale" not in self.tensors


_A, _B = ("lora_A.weight", "r d"), ("lora_B.weight", "h r")
FORMS = [
    Form(LowRank, {"U": _A, "V": _B}),
    Form(EmbeddingLowRank, {"U": ("lora_embedding_A", "r d"), "V": ("lora_embedding_B", "h r")}),
    Form(DoRA, {"U": _A, "V": _B, "magnitude": ("lora_magnitude_vector", "h")}, flag="use_dora"),
]
_ENDS = {end for form in FORMS for end, _ in form.tensors.values()}  # before others are added


def form_of(update: Update) -> Form | None:
    """The form of an update's type, or None if PEFT's files cannot hold it."""
    return next((form for form in FORMS if form.update is type(update)), None)


def has_rank(peft_type: str) -> bool:
    """Whether configs of a type have a rank and alpha."""
    return any(form.needs_rank for form in forms_of(peft_type))


def forms_of(peft_type: str) -> list[Form]:
    """The forms of a type."""
    return [form for form in FORMS if form.peft_type == peft_type]


def flags() -> set[str]:
    """The boolean fields that a form may have."""
    return {form.flag for form in FORMS if form.flag}


def fields_of_types() -> dict[str, dict[str, str]]:
    """The types that a config may have → their fields with other names than LoRA's."""
    types: dict[str, dict[str, str]] = {}
    for form in FORMS:
        types.setdefault(form.peft_type, {}).update(form.fields)
    return types


def closest_form(found: Mapping[str, Tensor], forms: Sequence[Form]) -> Form:
    """The form with the fewest tensors that has all that were found, or else the most of them."""

    def distance(form: Form) -> tuple[int, int, int]:
        other = sum(not _may_have(form.axes.get(stem, ()), tensor) for stem, tensor in found.items())
        return len(found.keys() - form.axes.keys()), other, len(form.axes)

    return min(forms, key=distance)


def parse_key(key: str) -> re.Match[str] | None:
    """The match (site, stem, adapter's name) of a tensor's key; None if no form has such a key."""
    ends = {end for form in FORMS for end, _ in form.tensors.values()}
    stems = "|".join(sorted({re.escape(_stem(end)) for end in ends}))
    match = re.fullmatch(
        rf"base_model\.model\.(?P<site>.+)\.(?P<stem>{stems})(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?",
        key,
    )
    named = [end for end in ends if match and _stem(end) == match["stem"]]
    fits = any(key.endswith(".weight") or not end.endswith(".weight") for end in named)
    return match if fits else None


def axis_counts(stem: str) -> set[int]:
    """The numbers of axes that tensors with this stem may have."""
    return {len(form.axes[stem]) for form in FORMS if stem in form.axes}


def _may_have(axes: Sequence[str], tensor: Tensor) -> bool:
    """Whether a tensor has this number of axes, and the size 1 where they say so."""
    sizes = tensor.shape
    return len(axes) == len(sizes) and all(a != "1" or n == 1 for a, n in zip(axes, sizes, strict=True))


def _stem(end: str) -> str:
    return end.split(".")[0]


def _in_file(tensor: Tensor, axes: Sequence[str]) -> Tensor:
    """A tensor of an update as the file has it, as a view."""
    sizes = iter(tensor.shape[::-1])
    return _reversed(tensor).reshape([1 if axis == "1" else next(sizes) for axis in axes])


def _from_file(tensor: Tensor, axes: Sequence[str]) -> Tensor:
    """A tensor of a file as the update has it."""
    named = [size for axis, size in zip(axes, tensor.shape, strict=True) if axis != "1"]
    return _reversed(tensor.reshape(named))


def _reversed(tensor: Tensor) -> Tensor:
    """A view with the axes in reverse order."""
    return tensor.permute(*reversed(range(tensor.ndim)))
