"""Rows that are tokens already: `input_ids` and `labels`, as other libraries write them.

It does not cut or count them.
"""

from typing import Any

from brushstroke.data.checks import kind_of
from brushstroke.data.examples import Example
from brushstroke.data.files import Row
from brushstroke.errors import DataError


def read_tokenised(row: Row, number: int, where: str) -> list[Example]:
    """The example of a row: `labels` are aligned with `input_ids`, -100 is not trained; padding is taken out.

    Raises:
        DataError: the lists do not go together.
    """
    given = row.get("example")
    if isinstance(given, Example):
        return [given if given.row else Example(given.tokens, given.weights, number, given.roles, given.cut)]
    tokens, labels = (_integers(row[name], name, where) for name in ("input_ids", "labels"))
    weights = row.get("weights")
    given = [1.0] * len(tokens) if weights is None else _numbers(weights, "weights", where)
    if not len(tokens) == len(labels) == len(given):
        raise DataError(
            f"{where}: input_ids, labels and weights have {len(tokens)}, {len(labels)} and {len(given)} "
            "entries; give one label for each token, -100 where it is not trained"
        )
    for index, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label not in (-100, token):
            raise DataError(
                f"{where}: labels[{index}] is {label} and input_ids[{index}] is {token}; a label is -100 "
                "or the token at its own place (do not shift the labels)"
            )
    real = _integers(row.get("attention_mask") or [1] * len(tokens), "attention_mask", where)
    kept = [i for i in range(len(tokens)) if real[i]]
    trained = [given[i] if labels[i] != -100 else 0.0 for i in kept]
    ids = tuple(tokens[i] for i in kept)
    return [Example(ids, (0.0, *trained[1:]) if ids else (), number, {"tokens": len(ids)})]


def _integers(values: Any, name: str, where: str) -> list[int]:
    numbers = _numbers(values, name, where)
    if any(number != int(number) or (number < 0 and number != -100) for number in numbers):
        raise DataError(f"{where}: {name!r} holds a value that is no token id; expected whole numbers from 0")
    return [int(number) for number in numbers]


def _numbers(values: Any, name: str, where: str) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or any(not isinstance(value, int | float) for value in values):
        raise DataError(f"{where}: {name!r} is {kind_of(values)}; expected a list of numbers")
    return list(values)
