"""The base and the adapters that `generate`, `chat` and `evaluate` are given.

Adapters are read first: a mistake in their names is answered before the base is loaded.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from brushstroke.cli.console import say
from brushstroke.cli.options import BaseOptions
from brushstroke.cli.values import named_adapters

if TYPE_CHECKING:
    from brushstroke.adapter import Adapter

AdapterFlags = Annotated[
    list[str] | None,
    Parameter(name="--adapter", negative=(), help="An adapter: DIR, or NAME=DIR; repeatable."),
]


def load_adapters(given: Sequence[str] | None) -> "dict[str, Adapter]":
    """Name → adapter.

    Raises:
        ConfigError: names that cannot work.
        AdapterFileError: a folder that holds no whole adapter.
    """
    named = named_adapters(given or ())
    from brushstroke.formats import load

    return {name: load(folder) for name, folder in named.items()}


def load(base: str, options: BaseOptions) -> Any:
    """The base, which is a language model.

    Raises:
        BaseLoadError: it cannot be loaded.
        ConfigError: it is a model of another kind.
    """
    from brushstroke.base import load_base, require_base

    say(f"loading {base}")
    loaded = load_base(
        base,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    require_base(loaded)
    return loaded
