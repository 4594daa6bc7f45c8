"""Facts of a model of transformers: its dtype, and the width, vocabulary and context of its language model.

A composite model (text with images or sound) keeps these in the config of its text part. Nothing is tried
here, and nothing of a model is changed.
"""

from typing import Any

import torch
from torch import nn

_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a language model's embeddings; that of the first floating-point weight where it has none.

    The parts of a composite model may have other dtypes.
    """
    weight = _embedding(model)
    if weight is not None and weight.is_floating_point():
        return weight.dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def text_config(model: Any) -> Any:
    """The config of the language model in a model, or in the config of one; None where there is none."""
    config: Any = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # it has a text encoder and a decoder
        return config.get_text_config(decoder=True)


def hidden_size(model: nn.Module) -> int | None:
    """The width of a language model's layers; that of its embeddings where no config says it."""
    weight = _embedding(model)
    return _whole(text_config(model), "hidden_size") or (None if weight is None else weight.shape[1])


def vocabulary_size(model: nn.Module) -> int | None:
    """The tokens that a language model knows; the rows of its embeddings where no config says it."""
    return _whole(text_config(model), "vocab_size") or embedding_rows(model)


def embedding_rows(model: nn.Module) -> int | None:
    """The tokens that a model has embeddings for; some have more than its vocabulary, for the speed."""
    weight = _embedding(model)
    return None if weight is None else weight.shape[0]


def context_length(model: Any) -> int | None:
    """The most tokens that a model has positions for, where its config or a table of positions says so.

    Args:
        model: a model, or a config, which knows of no table.
    """
    told = _told_context(model)
    learnt = learnt_positions(model) if isinstance(model, nn.Module) else None
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


def _told_context(model: Any) -> int | None:
    config = text_config(model)
    return next((length for name in _CONTEXT_NAMES if (length := _whole(config, name))), None)


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _embedding(model: nn.Module) -> torch.Tensor | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        weight = getattr(getter() if callable(getter) else None, "weight", None)
    except (NotImplementedError, AttributeError):  # a model that looks no tokens up
        return None
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def _tables(name: str, module: nn.Module) -> list[tuple[str, int]]:
    """The name and the rows of a module, if it is an embedding, and of its buffers (GPT-J has such)."""
    own = [(name, module.num_embeddings)] if isinstance(module, nn.Embedding) else []
    return own + [(name, len(x)) for name, x in module.named_buffers(recurse=False) if x.ndim == 2]
