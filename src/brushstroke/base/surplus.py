"""Whether files hold the weights of a class: all of them, in its shapes, and none that it does not have.

Those that a class declares itself are none of them: transformers leaves them out of its report.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from brushstroke.base.architecture import is_language_model, unknown_class
from brushstroke.base.model_facts import text_config
from brushstroke.errors import BaseLoadError

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


Mismatch = tuple[str, Iterable[int], Iterable[int]]  # key, its shape in the files, its shape by the config


def require_whole(
    name: str,
    model: nn.Module,
    *,
    missing: Iterable[str],
    mismatched: Iterable[Mismatch],
    unexpected: Iterable[str],
) -> None:
    """Refuse files that lack a weight, which would be random, or hold one that the class does not have.

    Args:
        name: of the base.
        model: of the class that the config names, or of its fallback.
        missing: parameters of the model that the files lack.
        mismatched: those that have another shape there.
        unexpected: keys of the files for which the model has no place.

    Raises:
        BaseLoadError: naming what is missing, of another shape or too much.
    """
    kind = type(model).__name__
    lost = sorted(missing)
    others = [
        f"{key}: {_shape(found)} in the files, {_shape(wanted)} by the config"
        for key, found, wanted in sorted(mismatched, key=lambda entry: entry[0])
    ]
    surplus = [] if lost or others else surplus_tensors(model, unexpected)
    if not (lost or others or surplus):
        return
    listed = "; ".join([*lost[:4], *others[:4], *surplus[:4]])
    if (named := unknown_class(getattr(model, "config", None))) is not None:
        raise BaseLoadError(
            f"config.json of {name} names no class that transformers knows (architectures: {named}), and the "
            f"files do not fit a {kind} ({listed}); write the class that they are of under architectures, "
            'such as ["BertForSequenceClassification"]'
        )
    if surplus:
        raise BaseLoadError(
            f"{name} is a {kind} by its config, and its files hold {len(surplus)} weights that this class "
            f"does not have ({listed}); name the right class under architectures in its "
            "config.json, or load the model yourself and pass Base(model, tokenizer)"
        )
    raise BaseLoadError(
        f"{name} is not a whole {kind}: {len(lost)} weights are missing and {len(others)} have another shape "
        f"than its config says ({listed}); fetch it again, or load the model yourself and pass "
        "Base(model, tokenizer)"
    )


def _shape(sizes: Iterable[int]) -> str:
    return f"({', '.join(map(str, sizes))})"


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
