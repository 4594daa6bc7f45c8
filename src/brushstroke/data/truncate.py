"""The length limit: cuts examples at it, and refuses rows with nothing left to train.

It does not tokenise.
"""

from collections.abc import Mapping, Sequence

from brushstroke.data.examples import Example
from brushstroke.data.rows import Rows
from brushstroke.errors import DataError

_SHOWN = 10  # number of rows that a message lists


def refuse_untrained(
    rows: Rows, untrained: Sequence[int], filled: Mapping[int, int], max_length: int | None, skip: bool
) -> None:
    """Refuse rows with nothing to train.

    Args:
        rows: the data.
        untrained: the numbers of rows in which nothing is trained.
        filled: the numbers of rows whose prompt fills the limit → the limit that they need.
        max_length: the limit in tokens.
        skip: whether these rows are left out instead.

    Raises:
        DataError: there are such rows.
    """
    if untrained:
        count = "1 row has" if len(untrained) == 1 else f"{len(untrained)} rows have"
        raise DataError(
            f"{count} nothing to train on (an empty text, or labels that are all -100): "
            f"{_listed(rows, untrained)}; remove such rows"
        )
    if filled and not skip:
        count = "1 row has" if len(filled) == 1 else f"{len(filled)} rows have"
        raise DataError(
            f"{count} a prompt that fills the limit of {max_length} tokens, so nothing is left to train on: "
            f"{_listed(rows, list(filled))}; raise max_length (--max-length) to {max(filled.values())} or "
            "more, if the model's context allows it, or remove such rows (in training, skip_too_long or "
            "--skip-too-long leaves them out)"
        )


def _listed(rows: Rows, numbers: Sequence[int]) -> str:
    places: dict[str, list[str]] = {}
    for number in numbers[:_SHOWN]:
        file, _, row = rows.where(number).rpartition(", row ")
        places.setdefault(file, []).append(row)
    parts = (f"{file}, row{'s' * (len(found) > 1)} {', '.join(found)}" for file, found in places.items())
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return "; ".join(parts) + more


def shortened(example: Example, limit: int) -> Example:
    """The example without its tokens beyond a limit; those that are trained are counted as cut."""
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
