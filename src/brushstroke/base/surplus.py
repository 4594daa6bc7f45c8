"""Tensors in a model's files that its class does not have: which of them tell that it is another model.

Those that a class declares itself are none of them: transformers leaves them out of its report.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from brushstroke.base.architecture import is_language_model
from brushstroke.base.told import text_config

# Older releases stored these, which a model makes by itself.
_CONSTANTS = (
    "inv_freq",
    "position_ids",
    "token_type_ids",
    "masked_bias",
    "causal_mask",
    "relative_position_index",
    "num_batches_tracked",
)


def surplus_tensors(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """The keys in the files which show that they hold another model than one of this class.

    Constants of older releases show nothing, nor do layers that the config says predict tokens further ahead,
    which transformers leaves out. Files of an encoder or a classifier may hold a part that the
    class has not at all, as those of BERT hold two heads and a pooler; where a language model has such a
    part, it is a classifier or the like.

    Args:
        model: as loaded.
        unexpected: keys of the files for which the model has no place.
    """
    if getattr(model, "hf_quantizer", None):  # its weights are in pieces
        return []
    modules = dict(model.named_modules())
    buffers = {name for name, _ in model.named_buffers()}
    prefix = getattr(model, "base_model_prefix", "")
    language = is_language_model(model, getattr(model, "config", None))
    found = []
    for key in sorted(unexpected):
        forms = (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}")  # files have the prefix or not
        place = max(forms, key=lambda form: len(_ancestor(form, modules)))
        if place in buffers or _is_constant(place, modules) or _looks_ahead(place, text_config(model)):
            continue
        if language or not _is_absent_part(place, modules):
            found.append(key)
    return found


def _ancestor(key: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module of the model that a tensor of this key would lie in."""
    path = key.rpartition(".")[0]
    while path not in modules:
        path = path.rpartition(".")[0]
    return path


def _is_constant(key: str, modules: dict[str, nn.Module]) -> bool:
    owner, _, last = key.rpartition(".")
    mask = last == "bias" and owner in modules and any(True for _ in modules[owner].children())
    return mask or last in _CONSTANTS


def _looks_ahead(key: str, config: Any) -> bool:
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", key)
    first, count = (getattr(config, name, 0) for name in ("num_hidden_layers", "num_nextn_predict_layers"))
    return layer is not None and bool(count) and first <= int(layer[1]) < first + count


def _is_absent_part(key: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a key lies in a module that the model has not at all, and not in one layer more."""
    ancestor = _ancestor(key, modules)
    part, _, inside = key.removeprefix(ancestor).removeprefix(".").partition(".")
    return not ancestor or (bool(inside) and not part.isdigit())
