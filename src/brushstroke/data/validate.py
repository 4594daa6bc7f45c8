"""What a row may hold: the words for what was found, and the check of a text.

It does not know columns, conversations or templates.
"""

from collections.abc import Mapping
from typing import Any

from brushstroke.errors import DataError

Message = Mapping[str, Any]


class DataWarning(UserWarning):
    """Data may teach something else than what was meant."""


def check_encodable(text: str, place: str) -> None:
    """Refuse half a surrogate pair: JSON can write it, but it is no character.

    Raises:
        DataError: with the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half of a surrogate pair at character {error.start + 1}; write it whole"
        ) from error


def describe_type(value: object) -> str:
    """What a value is, in words that someone who looks at the file understands.

    >>> describe_type(None), describe_type(3), describe_type([1])
    ('null', 'a number (3)', 'a list')
    """
    match value:
        case None:
            return "null"
        case bool():
            return f"a boolean ({str(value).lower()})"
        case int() | float():
            return f"a number ({value})"
        case str():
            return "text"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"
