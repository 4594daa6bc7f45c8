"""What the analysis commands read: adapters, their base, and what can be told before either is loaded."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from brushstroke.checks import check_dense_limit, check_stored
from brushstroke.cli.adapters import load_adapter
from brushstroke.cli.console import say
from brushstroke.cli.values import Whole, whole
from brushstroke.fetch import adapter_shapes
from brushstroke.locate import require_base_files, stored_shapes

if TYPE_CHECKING:
    from brushstroke.adapter import Adapter
    from brushstroke.analysis import DirectionCache

Count = Annotated[int, Parameter(converter=whole)]
PROGRESS_SECONDS = 10.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AgainstBase:
    """How an adapter is measured against its base.

    Args:
        seed: Seed of the random directions.
        dense_limit: Decompose weights in full if their smaller side is at most this [default: 1536].
        allow_different_base: Measure even if the adapter was trained on another base.
        trust_remote_code: Run the code that the base brings along, where transformers lacks its class.
        cache: Keep the base's own directions for the next command, and take them from there.
    """

    seed: Count = 0
    dense_limit: Whole = None
    allow_different_base: bool = False
    trust_remote_code: bool = False
    cache: bool = True

    def arguments(self) -> dict[str, Any]:
        """What `relate` and `intruders` are given."""
        values = dataclasses.asdict(self)
        del values["trust_remote_code"], values["cache"]
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """Refuse what cannot work, before torch is loaded.

        Raises:
            ConfigError: a negative limit.
        """
        if self.dense_limit is not None:
            check_dense_limit(self.dense_limit)

    def directions(self) -> "DirectionCache | None":
        """Where the base's own directions are kept, unless the user wants none."""
        from brushstroke.analysis import DirectionCache

        return DirectionCache() if self.cache else None


def check_fit(adapters: Sequence[Path], base: str | None) -> None:
    """Refuse adapters and a base that are not there or do not fit, before torch is loaded."""
    shapes = [adapter_shapes(name) for name in adapters]
    if base is not None:
        require_base_files(base)
        stored = stored_shapes(base)
        for sites in shapes:
            check_stored(sites, stored)


def load_adapters(*folders: Path) -> "dict[str, Adapter]":
    """Name → adapter; the folders' own names where these differ, else their whole paths."""
    named = {name_of(folder): folder for folder in folders}
    if len(named) < len(folders):
        named = {str(folder): folder for folder in folders}
    loaded = {name: load_adapter(folder) for name, folder in named.items()}
    for name, adapter in loaded.items():
        if adapter.copies:
            say(
                f"{name} holds copies of {', '.join(adapter.copies)}, which are not compared with a base here"
            )
    return loaded


def name_of(folder: Path) -> str:
    """What an adapter's folder is called."""
    return folder.expanduser().resolve().name


def open_weights(base: str, trust_remote_code: bool) -> Any:
    """The weights of a base, one tensor at a time where its files allow it."""
    from brushstroke.base import open_base

    return open_base(base, trust_remote_code=trust_remote_code)


def site_progress() -> Callable[[str, int, int], None]:
    """A line for people now and then, where it takes long."""
    told = time.monotonic()

    def on_site(site: str, number: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            say(f"site {number} of {total}: {site}")

    return on_site


def tell_of_cache(cache: "DirectionCache | None") -> None:
    """Say where directions of the base came from, or that they are not kept."""
    if cache is None:
        return
    if cache.used:
        say(
            f"the base's own directions at {cache.used} sites are from {cache.folder} "
            "(--no-cache computes them anew)"
        )
    if cache.failure:
        say(f"the base's own directions are not kept for the next command: {cache.failure}")
