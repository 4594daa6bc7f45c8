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
    """The most tokens that a model has positions for, where its config or a table of positions says so."""
    told, learnt = _told_context(model), learnt_positions(model)
    return told if told is None or learnt is None else min(told, learnt)


def learnt_positions(model: nn.Module) -> int | None:
    """The tokens that a table of positions is long enough for, where the language model has one.

    A table is known by its name and by a length near to the config's context: OPT's has two rows more, and
    RoBERTa's begins behind the token for padding.
    """
    context = _told_context(model)
    if context is None:
        return None
    getter = getattr(model, "get_decoder", None)
    decoder: Any = getter() if callable(getter) else None
    lengths = []
    for name, module in (decoder if isinstance(decoder, nn.Module) else model).named_modules():
        for last, rows in _tables(name.rpartition(".")[2], module):
            if ("pos" in last or last == "wpe") and context <= rows <= context + 2:
                padding = getattr(module, "padding_idx", None)
                lengths.append(min(context, rows) if padding is None else rows - padding - 1)
    return min(lengths, default=None)


def _told_context(model: nn.Module) -> int | None:
    length = getattr(text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _tables(name: str, module: nn.Module) -> list[tuple[str, int]]:
    """The name and the rows of a module, if it is an embedding, and of its buffers (GPT-J has such)."""
    own = [(name, module.num_embeddings)] if isinstance(module, nn.Embedding) else []
    return own + [(name, len(x)) for name, x in module.named_buffers(recurse=False) if x.ndim == 2]


def text_config(model: nn.Module) -> Any:
    """The config of the language model in a model."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
