"""Checks that files contain exactly the weights of a class, in its shapes.

It does not see weights that the class itself declares as ignorable: transformers omits them from its report.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from brushstroke.base.architecture import is_language_model, unknown_class
from brushstroke.base.model_facts import text_config
from brushstroke.errors import BaseLoadError

# Stored by older releases; a model computes these itself.
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
    """Refuse files that lack a weight (it would be random) or contain one that the class does not have.

    Args:
        name: the name of the base.
        model: an instance of the class that the config names, or of the fallback class.
        missing: parameters of the model that the files lack.
        mismatched: parameters that have another shape in the files.
        unexpected: keys of the files that match no weight of the model.

    Raises:
        BaseLoadError: naming the weights that are missing, have another shape, or do not belong to the class.
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
            f"files do not fit a {kind} ({listed}); write the class of these files under architectures, "
            'such as ["BertForSequenceClassification"]'
        )
    if surplus:
        raise BaseLoadError(
            f"{name} is a {kind} by its config, but its files contain {len(surplus)} weights that this class "
            f"does not have ({listed}); name the right class under architectures in its "
            "config.json, or load the model yourself and pass Base(model, tokenizer)"
        )
    raise BaseLoadError(
        f"{name} is not a complete {kind}: {len(lost)} weights are missing and {len(others)} have another "
        f"shape than its config says ({listed}); fetch it again, or load the model yourself and pass "
        "Base(model, tokenizer)"
    )


def _shape(sizes: Iterable[int]) -> str:
    return f"({', '.join(map(str, sizes))})"


def surplus_tensors(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """The keys which show that the files belong to a model of another class.

    Ignored are constants of older releases, and layers that predict tokens further ahead according to the
    config (transformers does not load them). The files of an encoder or a classifier may contain a part that
    the class lacks completely, for example the two heads and the pooler of BERT. For a language model such a
    part is surplus: the files are those of a classifier or a similar model.

    Args:
        model: the loaded model.
        unexpected: keys of the files that match no weight of the model.
    """
    if getattr(model, "hf_quantizer", None):  # quantised weights are stored as several tensors
        return []
    modules = dict(model.named_modules())
    buffers = {name for name, _ in model.named_buffers()}
    prefix = getattr(model, "base_model_prefix", "")
    language = is_language_model(model, getattr(model, "config", None))
    found = []
    for key in sorted(unexpected):
        forms = (
            key,
            key.removeprefix(f"{prefix}."),
            f"{prefix}.{key}",
        )  # files may or may not use the prefix
        place = max(forms, key=lambda form: len(_ancestor(form, modules)))
        if place in buffers or _is_constant(place, modules) or _looks_ahead(place, text_config(model)):
            continue
        if language or not _is_absent_part(place, modules):
            found.append(key)
    return found


def _ancestor(key: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module of the model that would contain a tensor with this key."""
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
    """Whether a key belongs to a module that the model lacks, other than an additional layer of a list."""
    ancestor = _ancestor(key, modules)
    part, _, inside = key.removeprefix(ancestor).removeprefix(".").partition(".")
    return not ancestor or (bool(inside) and not part.isdigit())
