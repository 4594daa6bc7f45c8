"""Facts read from a transformers model: dtype, width, vocabulary, context length, learnt positions.

A composite model (text with images or sound) keeps these in the config of its text part. Nothing runs here,
and no model is changed.
"""

from typing import Any

import torch
from torch import nn

_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a language model's embeddings; without embeddings that of the first floating-point weight.

    The parts of a composite model may have other dtypes.
    """
    weight = _embedding(model)
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def text_config(model: Any) -> Any:
    """The config of the language model in a model, or in a model's config; None if there is none."""
    config: Any = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # it has a text encoder and a decoder
        return config.get_text_config(decoder=True)


def hidden_size(model: nn.Module) -> int | None:
    """The width of a language model's layers; without a config entry, the width of its embeddings."""
    weight = _embedding(model)
    return _positive_int(text_config(model), "hidden_size") or (None if weight is None else weight.shape[1])


def vocabulary_size(model: nn.Module) -> int | None:
    """The size of a language model's vocabulary; without a config entry, the rows of its embeddings."""
    return _positive_int(text_config(model), "vocab_size") or embedding_rows(model)


def embedding_rows(model: nn.Module) -> int | None:
    """The number of rows of the embeddings; it may exceed the vocabulary, padded for speed."""
    weight = _embedding(model)
    return None if weight is None else weight.shape[0]


def context_length(model: Any) -> int | None:
    """The largest number of positions by a model's config or its learnt position table; None if unknown.

    Args:
        model: a model, or a config (then no table is read).
    """
    declared = _declared_context(model)
    learnt = learnt_positions(model) if isinstance(model, nn.Module) else None
    return declared if declared is None or learnt is None else min(declared, learnt)


def learnt_positions(model: nn.Module) -> int | None:
    """The number of tokens that the learnt position table of a language model covers; None without a table.

    A table is recognised by its name and by a length close to the config's context. OPT's table has two more
    rows; in RoBERTa's, the positions begin after the padding index.
    """
    context = _declared_context(model)
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


def _declared_context(model: Any) -> int | None:
    config = text_config(model)
    return next((length for name in _CONTEXT_NAMES if (length := _positive_int(config, name))), None)


def _positive_int(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _embedding(model: nn.Module) -> torch.Tensor | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(getter() if callable(getter) else None, "weight", None)
    except (NotImplementedError, AttributeError):  # a model without token embeddings
        return None
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def _tables(name: str, module: nn.Module) -> list[tuple[str, int]]:
    """(name, rows) of a module if it is an embedding, and of its 2-d buffers (as in GPT-J)."""
    own = [(name, module.num_embeddings)] if isinstance(module, nn.Embedding) else []
    return own + [(name, len(x)) for name, x in module.named_buffers(recurse=False) if x.ndim == 2]
