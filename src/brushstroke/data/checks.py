"""What a row may hold: the words for what was found, and the checks of texts and conversations.

It does not know columns or templates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from brushstroke.errors import DataError, did_you_mean

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer")


def check_messages(messages: object, where: str) -> None:
    """Refuse what is not a conversation.

    Raises:
        DataError: with the place and what is wrong there.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise DataError(
            f"{where}: 'messages' is {kind_of(messages)}; expected a list of objects with role and content"
        )
    if not messages:
        raise DataError(f"{where}: 'messages' is empty; expected at least a user and an assistant turn")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}: message {number} is {kind_of(message)}; expected an object with role and content"
            )
        role = message.get("role")
        if role not in ROLES:
            found = f"has the unknown role {role!r}" if isinstance(role, str) else "has no role"
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
            raise DataError(f"{where}: message {number} {found}{hint}; known roles are {', '.join(ROLES)}")
        _check_content(message, f"{where}: message {number} ({role})")


def _check_content(message: Message, place: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        check_encodable(content, place)
    elif content is None:
        if not message.get("tool_calls"):
            found = "null content" if "content" in message else "no content"
            raise DataError(f"{place} has {found}; expected text")
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise DataError(f"{place} has a part that is not text; only text can be trained on")
            check_encodable(part["text"], place)
    else:
        raise DataError(f"{place} has {kind_of(content)} as content; expected text")


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


def kind_of(value: object) -> str:
    """What a value is, in words that someone who looks at the file understands.

    >>> kind_of(None), kind_of(3), kind_of([1])
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
