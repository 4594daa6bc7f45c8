"""Converts words of the command line to values: integers, lists, patterns, named adapters.

The config that takes a value checks its limits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, get_args

from cyclopts import Parameter

from brushstroke.errors import BrushstrokeError, ConfigError, DataError

Number = TypeVar("Number", int, float)
LARGEST = 2**63 - 1  # the largest seed of torch
MAY_BE_EMPTY = ("--system",)


def refuse_empty(app: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """Refuse empty paths (they would mean the current folder) and empty texts of flags (called by cyclopts).

    Raises:
        ConfigError: a value is empty, or a path is invalid.
    """
    for argument in arguments:
        hint = argument.hint
        a_path = Path in (hint, *get_args(hint))
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        a_text = str in kinds  # not texts in a list, which may be empty
        for token in argument.tokens:
            needs_value = a_path or (a_text and token.keyword and argument.name not in MAY_BE_EMPTY)
            if needs_value and not token.value:
                raise ConfigError(
                    f"the value of {argument.name} is empty; give a value, or leave the flag out"
                )
            if a_path and "\0" in token.value:
                raise ConfigError(f"{argument.name}: {token.value!r} contains a NUL character")


def read_text(file: Path, flag: str, kind: type[BrushstrokeError] = DataError) -> str:
    """The text of a file that a flag names.

    Raises:
        BrushstrokeError: of this kind: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise kind(f"{file}: {error.strerror}; check the path that {flag} names") from error
    except UnicodeDecodeError as error:
        raise kind(f"{file} is not UTF-8; save it as UTF-8") from error


def whole(_: Any, tokens: Sequence[Any]) -> int:
    """Convert to an integer; cyclopts itself would round 1.5."""
    return _whole(tokens[0].value, "a whole number")


def whole_or_auto(_: Any, tokens: Sequence[Any]) -> int | str:
    """Convert to an integer, or "auto"."""
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


Count = Annotated[int, Parameter(converter=whole)]
Whole = Annotated[int | None, Parameter(converter=whole)]
WholeOrAuto = Annotated[str | None, Parameter(converter=whole_or_auto)]


def split(text: str) -> tuple[str, ...]:
    """Split a text at commas, except those inside brackets of a regular expression.

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
    """Read PATTERN=VALUE pairs.

    >>> patterns("--rank-pattern", "q_proj=16, mlp=4", int)
    {'q_proj': 16, 'mlp': 4}

    Raises:
        ConfigError: an invalid pair, or a pattern that appears twice.
    """
    values = {}
    for pair in split(text):
        pattern, separator, value = pair.rpartition("=")
        if pattern.strip() in values:
            raise ConfigError(f"{flag}: {pattern.strip()!r} appears twice; give it once")
        try:
            values[pattern.strip()] = number(value)
        except ValueError:
            separator = ""
        if not separator or not pattern.strip():
            kind = "a whole number" if number is int else "a number"
            raise ConfigError(f"{flag}: expected PATTERN=VALUE with {kind}, got {pair!r}; such as q_proj=16")
    return values


def named_adapters(given: Sequence[str]) -> dict[str, str]:
    """Map names to folders, from NAME=DIR, or from DIR, whose last part is the name.

    >>> named_adapters(["a=out/x", "out/streets"])
    {'a': 'out/x', 'streets': 'out/streets'}

    Raises:
        ConfigError: two equal names, or a reserved name.
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
                f"--adapter {text}: 'base' means the model without an adapter; use another name: NAME=DIR"
            )
        if name in named:
            raise ConfigError(f"--adapter: two adapters have the name {name!r}; rename one with NAME=DIR")
        named[name] = folder
    return named
