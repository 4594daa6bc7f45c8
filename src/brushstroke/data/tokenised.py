"""Reads rows that are already tokens: `input_ids` and `labels`, in the format of other libraries.

It does not truncate or count them.
"""

from collections.abc import Sequence
from typing import Any

from brushstroke.data.examples import Example
from brushstroke.data.files import Row
from brushstroke.data.validate import expect
from brushstroke.errors import DataError


def read_tokenised(row: Row, number: int, where: str) -> list[Example]:
    """The example of a row: `labels` match `input_ids` by position, -100 is not trained; padding is removed.

    Raises:
        DataError: the lists do not match.
    """
    given = row.get("example")
    if isinstance(given, Example):
        return [given if given.row else Example(given.tokens, given.weights, number, given.roles, given.cut)]
    tokens = _integers(row["input_ids"], "input_ids", where)
    labels = _integers(row["labels"], "labels", where, also=-100)
    weights = _numbers(row["weights"], "weights", where) if row.get("weights") is not None else None
    mask = row.get("attention_mask")
    real = [1] * len(tokens) if mask is None else _integers(mask, "attention_mask", where)
    lists = {"input_ids": tokens, "labels": labels, "weights": weights, "attention_mask": real}
    lengths = {name: len(values) for name, values in lists.items() if values is not None}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"{where}: the lists differ in length ({found}); give one entry for each token")
    for index, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label not in (-100, token):
            raise DataError(
                f"{where}: labels[{index}] is {label} and input_ids[{index}] is {token}; a label must be "
                "-100 or the token at the same position (do not shift the labels)"
            )
    kept = [index for index, is_real in enumerate(real) if is_real]
    trained = [
        0.0 if place == 0 or labels[index] == -100 else float(weights[index]) if weights else 1.0
        for place, index in enumerate(kept)
    ]
    return [Example(tuple(tokens[i] for i in kept), tuple(trained), number, {"tokens": len(kept)})]


def _integers(values: Any, name: str, where: str, also: int = 0) -> list[int]:
    numbers = _numbers(values, name, where)
    for index, value in enumerate(numbers):
        if isinstance(value, float) or (value < 0 and value != also):
            raise DataError(f"{where}: {name}[{index}] is {value}; expected integers of at least 0")
    return [int(value) for value in numbers]


def _numbers(values: Any, name: str, where: str) -> list[int | float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    numbers = enumerate(expect(Sequence, values, f"{where}: {name!r}", "a list of numbers"))
    return [expect((int, float), value, f"{where}: {name}[{index}]", "a number") for index, value in numbers]
