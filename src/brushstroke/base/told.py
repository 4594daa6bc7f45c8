"""What a model of transformers tells of itself: its dtype, its context, frequencies that move.

Nothing is tried here.
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
    name = "original_max_position_embeddings"
    sets = [rope, *(own for own in rope.values() if isinstance(own, dict))] if isinstance(rope, dict) else []
    own = [parameters[name] for parameters in sets if parameters.get(name)]
    return min(own) if own else getattr(text, name, None) or getattr(text, "max_position_embeddings", 0)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
