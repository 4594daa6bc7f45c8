"""What a model of transformers tells of itself: its dtype, its context, its learnt positions.

Nothing is tried here, and nothing of a model is changed.
"""

from typing import Any

import torch
from torch import nn


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def context_length(model: nn.Module) -> int | None:
    """The most tokens that a model has positions for, where its config says so."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def learnt_positions(model: nn.Module) -> int | None:
    """The context where it is the size of a table of learnt positions, beyond which nothing can run."""
    context = context_length(model)
    if context is None:
        return None
    tables = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("pos" in (last := name.rpartition(".")[2]) or last == "wpe")
    ]
    return context if any(context <= size <= context + 2 for size in tables) else None  # OPT's has two more


def text_config(model: nn.Module) -> Any:
    """The config of the language model in a model."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
