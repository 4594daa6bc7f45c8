"""RoPE types whose frequencies depend on the longest row of a batch (dynamic, longrope): limit and reset.

Also checks max_length. It computes no frequencies; transformers does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from brushstroke.base.model_facts import context_length, text_config
from brushstroke.errors import ConfigError

DYNAMIC_TYPES = ("dynamic", "longrope")
# Endings of the names of the attributes and buffers that rotary modules change.
CHANGED_NAMES = ("inv_freq", "max_seq_len_cached", "attention_scaling")


def dynamic_rope_limit(model: nn.Module) -> int | None:
    """The row length in tokens above which the rotary frequencies of the whole batch change; None if never.

    Different kinds of layers may have their own parameters; the result is the lowest of their limits.
    """
    text = text_config(model)
    if not any(kind in repr(getattr(text, "rope_parameters", None)) for kind in DYNAMIC_TYPES):
        return None
    context = context_length(text) or 0
    limits = []
    for kind, parameters in _rope_sets(text):
        if kind == "longrope":
            name = "original_max_position_embeddings"
            limits.append(parameters.get(name) or getattr(text, name, None) or context)
        elif "dynamic" in kind:
            limits.append(context)
    return min(limits, default=0)


def check_max_length(model: Any, max_length: int | None) -> None:
    """Refuse a maximum example length that exceeds the model's context.

    Frequencies of type `dynamic` also support longer rows: they allow any limit.

    Args:
        model: a model, or its config.
        max_length: the limit in tokens; None is no limit.

    Raises:
        ConfigError: the limit exceeds the context; the message gives both numbers.
    """
    context = context_length(model)
    if max_length is None or context is None or max_length <= context:
        return
    if any("dynamic" in kind for kind, _ in _rope_sets(text_config(model))):
        return
    raise ConfigError(
        f"max_length (--max-length) is {max_length}, and the model's context has {context} tokens; lower it "
        f"to {context} or leave it out"
    )


def _rope_sets(text: Any) -> list[tuple[str, dict[str, Any]]]:
    """(type, parameters) of the rotary frequencies in a text config, and for each kind of layers."""
    rope = getattr(text, "rope_parameters", None)
    sets = [rope, *(own for own in rope.values() if isinstance(own, dict))] if isinstance(rope, dict) else []
    return [(str(parameters.get("rope_type") or parameters.get("type")), parameters) for parameters in sets]


def reset_dynamic_rope(model: nn.Module) -> None:
    """Restore the initial frequencies of rotary modules that store the longest row so far (dynamic)."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            first = getattr(module, f"{kind}original_inv_freq", None)
            length = getattr(module, "original_max_seq_len", None)
            if isinstance(first, torch.Tensor) and length is not None:
                now = getattr(module, f"{kind}inv_freq")
                module.register_buffer(f"{kind}inv_freq", first.to(now.device, copy=True), persistent=False)
                setattr(module, name, length)


@contextmanager
def preserved_rope(model: nn.Module) -> Iterator[None]:
    """Context manager: a model starts with its initial frequencies; on exit the earlier ones are restored."""
    if dynamic_rope_limit(model) is None:
        yield
        return
    stores = [values for module in model.modules() for values in (vars(module), module._buffers)]
    before = [(values, _changeable(values)) for values in stores]
    copies = [(x, x.clone()) for _, kept in before for x in kept.values() if isinstance(x, torch.Tensor)]
    try:
        reset_dynamic_rope(model)
        yield
    finally:
        for values, kept in before:
            for name in _changeable(values).keys() - kept.keys():
                del values[name]  # transformers creates some only for long rows
            values.update(kept)
        for tensor, copy in copies:
            if not torch.equal(tensor, copy):  # transformers overwrites some in place
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(copy)


def _changeable(values: dict[str, Any]) -> dict[str, Any]:
    """The attributes and buffers that a rotary module changes."""
    return {name: value for name, value in values.items() if name.endswith(CHANGED_NAMES)}
