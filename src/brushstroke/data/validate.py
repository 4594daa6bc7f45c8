"""Checks texts, and describes values for error messages.

It does not depend on columns, conversations or templates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from brushstroke.errors import DataError

Message = Mapping[str, Any]
T = TypeVar("T")


class DataWarning(UserWarning):
    """The data may train something that the user did not intend."""


def check_encodable(text: str, place: str) -> None:
    """Refuse half a surrogate pair: JSON can contain it, but it is not a character.

    Raises:
        DataError: the text contains one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} contains half of a surrogate pair at character {error.start + 1}; write the complete "
            "character"
        ) from error


def expect(kind: type[T] | tuple[type[T], ...], value: object, place: str, expected: str) -> T:
    """The value, if it is of this type; a text is no sequence.

    Args:
        kind: such as str, Mapping, Sequence or (int, float).
        value: of a data file.
        place: what the value is, for the error message.
        expected: what was expected instead, for the error message.

    Raises:
        DataError: it is of another type.
    """
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str | bytes)):
        raise DataError(f"{place} is {describe_type(value)}; expected {expected}")
    return value


def describe_type(value: object) -> str:
    """Describe the type of a value in the terms of a data file.

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
