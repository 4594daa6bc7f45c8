"""What a model of transformers tells of itself: its dtype, its context, frequencies that move.

Nothing is tried here, and nothing of a model is changed but what it remembers of longer rows.
"""

from typing import Any

import torch
from torch import nn

MOVING = ("dynamic", "longrope")  # rotary frequencies that follow the longest position


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def context_length(model: nn.Module) -> int | None:
    """The most tokens that a model has positions for, where its config says so."""
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def moving_from(model: nn.Module) -> int | None:
    """Tokens beyond which a batch's longest row moves the rotary frequencies of all; None if none does.

    Kinds of layers may have parameters of their own: the first of them to move counts.
    """
    text = _text_config(model)
    rope = getattr(text, "rope_parameters", None)
    if not any(kind in repr(rope) for kind in MOVING):
        return None
    sets = [rope, *(own for own in rope.values() if isinstance(own, dict))] if isinstance(rope, dict) else []
    most = getattr(text, "max_position_embeddings", 0)
    limits = []
    for parameters in sets:
        kind = str(parameters.get("rope_type") or parameters.get("type"))
        if kind == "longrope":
            name = "original_max_position_embeddings"
            limits.append(parameters.get(name) or getattr(text, name, None) or most)
        elif "dynamic" in kind:
            limits.append(most)
    return min(limits, default=0)


def forget_longest(model: nn.Module) -> None:
    """Give rotary modules that remember the longest row so far (dynamic) their first frequencies again."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            kind = name.removesuffix("max_seq_len_cached")
            first = getattr(module, f"{kind}original_inv_freq", None)
            length = getattr(module, "original_max_seq_len", None)
            if isinstance(first, torch.Tensor) and length is not None:
                now = getattr(module, f"{kind}inv_freq")
                module.register_buffer(f"{kind}inv_freq", first.to(now.device, copy=True), persistent=False)
                setattr(module, name, length)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
