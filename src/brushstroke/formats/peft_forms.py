"""Describes how PEFT's files store each type of update: tensor names, and the field of the config.

A new type of update is one entry in `FORMS`. It reads and writes no files.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brushstroke.layers.dora import DoRA
from brushstroke.layers.embedding import EmbeddingLowRank
from brushstroke.lowrank import LowRank, Update

_KEY = re.compile(
    r"base_model\.model\.(?P<site>.+)\.(?P<stem>lora_[A-Za-z_]+)(\.(?P<adapter>(?!weight$)[^.]+))?(\.weight)?"
)


@dataclass(frozen=True)
class Form:
    """One type of update in PEFT's files; matrices are stored transposed.

    Args:
        update: the type, made from its tensors and `scale` by name.
        keys: name of a tensor in `Update.tensors()` → end of its key in the file.
        flag: the boolean field of `adapter_config.json` that is true for this type.
    """

    update: Callable[..., Update]
    keys: Mapping[str, str]
    flag: str | None = None

    @property
    def stems(self) -> dict[str, str]:
        """The first part of each key's end, such as "lora_A" → the name of the tensor."""
        return {end.split(".")[0]: name for name, end in self.keys.items()}

    def stored(self, update: Update) -> dict[str, Tensor]:
        """End of the key → tensor as the file has it: on the CPU, in rows, sharing memory with no other."""
        tensors = {name: tensor.detach().cpu() for name, tensor in update.tensors().items()}
        rows = torch.contiguous_format
        return {end: _transposed(tensors[name]).clone(memory_format=rows) for name, end in self.keys.items()}

    def read(self, found: Mapping[str, Tensor], scale: float) -> Update:
        """The update of the tensors found in a file, by their stems.

        Raises:
            ShapeError: they do not fit one another.
        """
        tensors = {name: _transposed(found[stem]) for stem, name in self.stems.items()}
        # Uᵀ and V in rows, as the layers use them: U stays a view.
        kept = {name: t if name == "U" else t.contiguous() for name, t in tensors.items()}
        return self.update(**kept, scale=scale)


FORMS = [
    Form(LowRank, {"U": "lora_A.weight", "V": "lora_B.weight"}),
    Form(EmbeddingLowRank, {"U": "lora_embedding_A", "V": "lora_embedding_B"}),
    Form(
        DoRA,
        {"U": "lora_A.weight", "V": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
        flag="use_dora",
    ),
]
FLAGS = {form.flag for form in FORMS if form.flag}


def form_of(update: Update) -> Form | None:
    """The form of an update's type, or None if PEFT's files cannot hold it."""
    return next((form for form in FORMS if form.update is type(update)), None)


def closest_form(stems: Any) -> Form:
    """The form with the fewest tensors that has all these stems, or else the most of them."""
    return min(FORMS, key=lambda form: (len(set(stems) - form.stems.keys()), len(form.stems)))


def parse_key(key: str) -> re.Match[str] | None:
    """The match (site, stem, adapter's name) of a tensor's key; None if no form has such a key."""
    match = _KEY.fullmatch(key)
    ends = [
        end for form in FORMS for end in form.keys.values() if match and end.split(".")[0] == match["stem"]
    ]
    fits = any(key.endswith(".weight") or not end.endswith(".weight") for end in ends)
    return match if fits else None


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT if tensor.ndim == 2 else tensor
