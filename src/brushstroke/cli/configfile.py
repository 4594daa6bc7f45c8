"""`--config FILE.yaml`: its keys are the flags of the command; a flag on the command line takes precedence.

Values are converted in the same way as those on the command line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from brushstroke.cli.hints import flag_hint
from brushstroke.cli.values import read_text
from brushstroke.errors import ConfigError

FLAG = "--config"


def take_config_flag(given: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments of a command without `--config FILE` or `--config=FILE`, and the file.

    Raises:
        ConfigError: the flag is given twice, or without a file.
    """
    rest, files = [], []
    words = iter(given)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == FLAG:
            files.append(next(words, ""))
        elif word.startswith(f"{FLAG}="):
            files.append(word.removeprefix(f"{FLAG}="))
        else:
            rest.append(word)
    if "" in files:
        raise ConfigError(f"the value of {FLAG} is empty; give a value, or leave the flag out")
    if len(files) > 1:
        raise ConfigError(f"{FLAG} is given {len(files)} times; give one file")
    return rest, Path(files[0]).expanduser() if files else None


def apply_config_file(path: Path, app: Any, commands: tuple[str, ...], arguments: Any) -> None:
    """Take the flags that are not on the command line from the file (called by cyclopts).

    Raises:
        ConfigError: the file cannot be read, or has a key that is not a flag.
    """
    by_key = {name.removeprefix("--"): argument for argument in arguments for name in argument.names}
    known = [key for key, argument in by_key.items() if key != "*" and not _is_negative(key, argument)]
    taken: dict[str, Any] = {}
    for key, value in _read(path).items():
        flag = str(key).replace("_", "-")
        if flag in taken:
            raise ConfigError(f"{path}: {taken[flag]!r} and {key!r} are the same flag; give it once")
        taken[flag] = key
        if flag not in known:
            hint = flag_hint(flag, known) or f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown key {key!r}{hint}")
        argument = by_key[flag]
        if value is None or argument.tokens:
            continue
        is_repeatable = isinstance(value, list) and any(
            get_origin(kind) is list for kind in (argument.hint, *get_args(argument.hint))
        )
        for inner in value if is_repeatable else [value]:
            argument.append(_token(flag, inner, argument, path))


def _is_negative(key: str, argument: Any) -> bool:
    return f"--{key}" in argument.negatives


def _read(path: Path) -> Mapping[Any, Any]:
    import yaml

    text = read_text(path, FLAG, ConfigError)
    try:
        twice, loaded = _given_twice(yaml.compose(text, yaml.SafeLoader)), yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply; its keys are flags, such as 'rank: 8'") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{line}: broken YAML ({getattr(error, 'problem', None) or 'it cannot be read'})"
        ) from error
    if twice:
        raise ConfigError(f"{path}: {twice!r} appears twice; give it once")
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigError(
            f"{path} must contain keys and values, such as 'rank: 8'; it contains {_kind(loaded)}"
        )
    return loaded


def _given_twice(root: Any) -> str | None:
    """A key that appears twice in the file's mapping or a nested one; YAML silently takes the last value."""
    if getattr(root, "id", None) != "mapping":
        return None
    for mapping in (root, *(value for _, value in root.value if value.id == "mapping")):
        keys = [key.value for key, _ in mapping.value if key.id == "scalar"]
        for key in keys:
            if keys.count(key) > 1:
                return key
    return None


def _token(flag: str, value: Any, argument: Any, path: Path) -> Any:
    from cyclopts import Token

    where = f"{flag} in {path}"
    if isinstance(value, bool):
        if argument.hint is not bool and bool not in getattr(argument.hint, "__args__", ()):
            raise ConfigError(f"{where}: expected a value, found {str(value).lower()}")
        return Token(keyword=flag, source=str(path), implicit_value=value)
    if isinstance(value, Mapping):
        text = ",".join(f"{name}={_scalar(inner, where)}" for name, inner in value.items())
    elif isinstance(value, list):
        text = ",".join(_scalar(inner, where) for inner in value)
    else:
        text = _scalar(value, where)
    return Token(keyword=flag, value=text, source=str(path))


def _scalar(value: Any, where: str) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{where}: expected text or a number, found {_kind(value)}")


def _kind(value: Any) -> str:
    return {list: "a list", dict: "a mapping", bool: "a switch", type(None): "nothing"}.get(
        type(value), f"a {type(value).__name__}"
    )
