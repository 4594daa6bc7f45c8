"""How the words of a command line become values: whole numbers, lists, patterns, named adapters.

The limits of a value are the business of the config that takes it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args

from cyclopts import Parameter

from brushstroke.errors import ConfigError

Number = TypeVar("Number", int, float)
LARGEST = 2**63 - 1  # what torch takes as a seed
MAY_BE_EMPTY = ("--system",)


def refuse_empty(app: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuse an empty path, which would be this folder, and a flag with an empty text (called by cyclopts).

    Raises:
        ConfigError: naming it, or a path that no file system takes.
    """
    for argument in arguments:
        hint = argument.hint
        a_path = Path in (hint, *get_args(hint))
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        a_text = str in kinds  # not in a list, which may be empty
        for token in argument.tokens:
            told = a_path or (a_text and token.keyword and argument.name not in MAY_BE_EMPTY)
            if told and not token.value:
                raise ConfigError(f"the value of {argument.name} is empty; give one, or leave it out")
            if a_path and "\0" in token.value:
                raise ConfigError(f"{argument.name}: {token.value!r} has a NUL character in its name")


def whole(_: Any, tokens: Sequence[Any]) -> int:
    """A whole number; cyclopts itself would round 1.5."""
    return _whole(tokens[0].value, "a whole number")


def whole_or_auto(_: Any, tokens: Sequence[Any]) -> int | str:
    """A whole number, or "auto"."""
    if tokens[0].value == "auto":
        return "auto"
    return _whole(tokens[0].value, "'auto' or a whole number")


def _whole(text: str, expected: str) -> int:
    try:
        found = int(text)
    except ValueError:
        raise ValueError(f"expected {expected}, got {text!r}") from None
    if abs(found) > LARGEST:
        raise ValueError(f"expected {expected} of at most {LARGEST}, got {text}")
    return found


Whole = Annotated[int | None, Parameter(converter=whole)]
WholeOrAuto = Annotated[str | None, Parameter(converter=whole_or_auto)]


def split(text: str) -> tuple[str, ...]:
    """The parts between the commas; a comma inside the brackets of a regular expression divides nothing.

    >>> split("q_proj, layers.[0,1].*,x{1,2}")
    ('q_proj', 'layers.[0,1].*', 'x{1,2}')
    """
    parts, start, closing, escaped = [], 0, [], False
    for index, letter in enumerate(text):
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter in "([{" and "]" not in closing:
            closing.append({"(": ")", "[": "]", "{": "}"}[letter])
        elif letter == "," and not closing:
            parts.append(text[start:index])
            start = index + 1
    return tuple(part.strip() for part in (*parts, text[start:]) if part.strip())


def patterns(flag: str, text: str, number: Callable[[str], Number]) -> dict[str, Number]:
    """PATTERN=VALUE pairs.

    >>> patterns("--rank-pattern", "q_proj=16, mlp=4", int)
    {'q_proj': 16, 'mlp': 4}

    Raises:
        ConfigError: a pair that is none, or a pattern that is given twice.
    """
    values = {}
    for pair in split(text):
        pattern, separator, value = pair.rpartition("=")
        if pattern.strip() in values:
            raise ConfigError(f"{flag}: {pattern.strip()!r} stands there twice; give it once")
        try:
            values[pattern.strip()] = number(value)
        except ValueError:
            separator = ""
        if not separator or not pattern.strip():
            kind = "a whole number" if number is int else "a number"
            raise ConfigError(f"{flag}: expected PATTERN=VALUE with {kind}, got {pair!r}; such as q_proj=16")
    return values


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Name → folder, from NAME=DIR, or DIR, which is called as its last part.

    >>> named_adapters(["a=out/x", "out/streets"])
    {'a': 'out/x', 'streets': 'out/streets'}

    Raises:
        ConfigError: two of one name, or a name that is taken.
    """
    named: dict[str, str] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or "/" in name:
            folder, name = text, text.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or "adapter"
        if not name or not folder:
            raise ConfigError(f"--adapter: expected NAME=DIR or DIR, got {text!r}")
        if name == "base":
            raise ConfigError(
                f"--adapter {text}: 'base' is the model without an adapter; give another name=DIR"
            )
        if name in named:
            raise ConfigError(f"--adapter: two adapters are called {name!r}; give them names: NAME=DIR")
        named[name] = folder
    return named
