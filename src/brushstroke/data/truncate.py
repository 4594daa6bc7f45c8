"""The length limit: cuts examples at it, counts them, and refuses those with nothing left to train.

It does not tokenise.
"""

from collections.abc import Sequence

from brushstroke.data.examples import Example
from brushstroke.data.read import Rows
from brushstroke.errors import DataError

_SHOWN = 10  # number of rows that a message lists


def truncate_examples(
    rows: Rows, examples: Sequence[Example], max_length: int | None, skip: bool, need_trained: bool
) -> tuple[list[Example], list[int]]:
    """Truncate examples to the limit; also return the rows left out because of it.

    Raises:
        DataError: rows have nothing to train, or a prompt that fills the limit (unless these are to be left
            out).
    """
    if need_trained and (empty := sorted({e.row for e in examples if not e.trained})):
        count = "1 row has" if len(empty) == 1 else f"{len(empty)} rows have"
        raise DataError(
            f"{count} nothing to train on (an empty text, or labels that are all -100): "
            f"{_listed(rows, empty)}; remove such rows"
        )
    kept, filled = [], []
    for example in examples:
        short = example if max_length is None else _shortened(example, max_length)
        if short.trained or not need_trained:
            kept.append(short)
        else:
            filled.append(example)
    numbers = sorted({example.row for example in filled})
    if filled and not skip:
        count = "1 row has" if len(numbers) == 1 else f"{len(numbers)} rows have"
        needed = max(example.first_target for example in filled) + 1
        raise DataError(
            f"{count} a prompt that fills the limit of {max_length} tokens, so nothing is left to train on: "
            f"{_listed(rows, numbers)}; raise max_length (--max-length) to {needed} or more, if the model's "
            "context allows it, or remove such rows (in training, skip_too_long or --skip-too-long leaves "
            "them out)"
        )
    return kept, numbers


def _listed(rows: Rows, numbers: Sequence[int]) -> str:
    places: dict[str, list[str]] = {}
    for number in numbers[:_SHOWN]:
        file, _, row = rows.where(number).rpartition(", row ")
        places.setdefault(file, []).append(row)
    parts = (f"{file}, row{'s' * (len(found) > 1)} {', '.join(found)}" for file, found in places.items())
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return "; ".join(parts) + more


def _shortened(example: Example, limit: int) -> Example:
    beyond = len(example.tokens) - limit
    if beyond <= 0:
        return example
    # Untrained tokens at the end (a newline after the end of the turn) do not matter.
    tail = next((i for i, weight in enumerate(reversed(example.weights)) if weight != 0), 0)
    roles = _cut_roles(example, beyond, tail)
    return Example(
        example.tokens[:limit],
        example.weights[:limit],
        example.row,
        roles,
        example.cut + max(0, beyond - tail),
    )


def _cut_roles(example: Example, beyond: int, tail: int) -> dict[str, int]:
    """Role counts after a cut, which removes the template's tail first, then the answer."""
    roles = dict(example.roles)
    answer = next((name for name in ("assistant", "completion", "text", "tokens") if name in roles), None)
    for name, most in (("template", tail), (answer, beyond), *((name, beyond) for name in tuple(roles))):
        if name in roles:
            taken = min(most, beyond, roles[name])
            roles[name] -= taken
            beyond -= taken
    return {name: count for name, count in roles.items() if count}
