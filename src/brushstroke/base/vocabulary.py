"""Checks that a model has an embedding for every token of its tokenizer, and of a text.

It changes neither the model nor the tokenizer.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from brushstroke.base.model_facts import embedding_rows
from brushstroke.errors import DataError

SHOWN = 3  # tokens named in a message


class VocabularyWarning(UserWarning):
    """A tokenizer has more tokens than the model's embedding has rows."""


def has_embedding(model: nn.Module, token: int | None) -> bool:
    """Whether `token` is given and has a row in the embedding (if the number of rows is known)."""
    rows = embedding_rows(model)
    return token is not None and (rows is None or token < rows)


def refuse_unknown_tokens(model: nn.Module, tokens: Iterable[int], where: str) -> None:
    """Refuse tokens that a model has no embedding for.

    Args:
        model: the model that receives the tokens.
        tokens: token ids.
        where: the row or the prompt, for the message.

    Raises:
        DataError: names the first such token and the number of rows of the embedding.
    """
    rows = embedding_rows(model)
    if rows is None:
        return
    unknown = next((token for token in tokens if not 0 <= token < rows), None)
    if unknown is not None:
        raise DataError(
            f"{where} has the token {unknown}, and the model's embedding has {rows} rows (tokens 0 to "
            f"{rows - 1}): use the tokenizer that belongs to this model, or resize the model's embedding"
        )


def warn_of_unknown_tokens(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Warn if a tokenizer has tokens without an embedding in the model; texts with them are refused."""
    rows = embedding_rows(model)
    if rows is None or tokenizer is None or (count := _count(tokenizer)) <= rows:
        return
    texts = tokenizer.convert_ids_to_tokens(list(range(rows, min(count, rows + SHOWN))))
    more = " and others" if count > rows + SHOWN else ""
    warnings.warn(
        f"the tokenizer of {name} has {count} tokens, and the model's embedding {rows} rows: texts with "
        f"{', '.join(map(repr, texts))}{more} are refused",
        VocabularyWarning,
        stacklevel=3,
    )


def _count(tokenizer: Any) -> int:
    """One more than the largest id; there may be a gap before the added tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or ()
    return max(len(tokenizer), 1 + max(added, default=-1))
