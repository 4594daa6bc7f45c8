"""Loads the base and the adapters that a command names.

Adapters are read first, so that a wrong name is reported before the base is loaded.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from brushstroke.cli.console import say
from brushstroke.cli.options import BaseOptions
from brushstroke.cli.values import named_adapters, read_text
from brushstroke.errors import DataError
from brushstroke.fetch import find_adapter

if TYPE_CHECKING:
    from brushstroke.adapter import Adapter

AdapterFlags = Annotated[
    list[str] | None,
    Parameter(
        name="--adapter",
        negative=(),
        help="An adapter: its folder, file or hub id, or NAME=FOLDER; repeatable.",
    ),
]


ToolsFile = Annotated[
    Path | None,
    Parameter(name="--tools", help="A JSON file with declarations of the functions that the model may call."),
]


def read_tools(file: Path | None) -> tuple[Any, ...]:
    """Read function declarations from a JSON file.

    Raises:
        DataError: the file cannot be read, or contains none.
    """
    if file is None:
        return ()
    from brushstroke.data.json_values import read_tools

    text = read_text(file.expanduser(), "--tools")
    try:
        return read_tools(json.loads(text), str(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON ({error})") from error


def load_adapters(given: Sequence[str] | None) -> "dict[str, Adapter]":
    """Map each adapter's name to the adapter.

    Raises:
        ConfigError: invalid names.
        AdapterFileError: a folder without a complete adapter.
    """
    return {name: load_adapter(folder) for name, folder in named_adapters(given or ()).items()}


def load_adapter(name: str | Path) -> "Adapter":
    """Load an adapter from a folder or a hub id; hub files are fetched before torch is loaded.

    Raises:
        AdapterFileError: there is no adapter, or it is incomplete.
    """
    folder = find_adapter(name)
    from brushstroke.formats import load

    return load(folder)


def load(base: str, options: BaseOptions) -> Any:
    """Load the base, which must be a language model.

    Raises:
        BaseLoadError: it cannot be loaded.
        ConfigError: it is another kind of model.
    """
    from brushstroke.base import load_base, require_base

    say(f"loading {base}")
    if options.quantize and base.endswith(".gguf"):
        say("the weights of a GGUF file were quantised before; they are quantised again, which adds an error")
    loaded = load_base(
        base,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        quantize=options.quantize,
    )
    require_base(loaded)
    return loaded
