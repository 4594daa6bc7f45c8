"""The inputs of the analysis commands: adapters and their base, and checks before either is loaded."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from brushstroke.checks import check_integer, check_one_rank, check_stored
from brushstroke.cli.adapters import load_adapter
from brushstroke.cli.console import say
from brushstroke.cli.values import Count, Whole
from brushstroke.fetch import adapter_shapes
from brushstroke.locate import require_base_files, stored_shapes

if TYPE_CHECKING:
    from brushstroke.adapter import Adapter
    from brushstroke.analysis import DirectionCache

PROGRESS_SECONDS = 10.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AgainstBase:
    """Settings of the comparison of an adapter with its base.

    Args:
        seed: Seed of the random directions.
        dense_limit: Decompose weights in full if their smaller side is at most this [default: 1536].
        allow_different_base: Allow an adapter that was trained on another base.
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        cache: Cache the singular directions of the base for the next command, and use the cache.
    """

    seed: Count = 0
    dense_limit: Whole = None
    allow_different_base: bool = False
    trust_remote_code: bool = False
    cache: bool = True

    def arguments(self) -> dict[str, Any]:
        """The arguments for `relate` and `intruders`."""
        values = dataclasses.asdict(self)
        del values["trust_remote_code"], values["cache"]
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """Refuse invalid settings before torch is loaded.

        Raises:
            ConfigError: a negative limit.
        """
        if self.dense_limit is not None:
            check_integer("dense_limit (--dense-limit)", self.dense_limit, 0)

    def directions(self) -> "DirectionCache | None":
        """The cache of the base's directions; None if the user disabled it."""
        from brushstroke.analysis import DirectionCache

        return DirectionCache() if self.cache else None


def check_fit(adapters: Sequence[Path], base: str | None) -> None:
    """Refuse missing adapters, a missing base, and shapes that do not match, before torch is loaded."""
    shapes = [adapter_shapes(name) for name in adapters]
    if base is not None:
        require_base_files(base)
        stored = stored_shapes(base)
        for sites in shapes:
            check_stored(sites, stored)


def check_budget(adapters: Sequence[Path], budget: int) -> None:
    """Refuse a budget that is too small for one rank of an adapter, before torch is loaded."""
    for shapes in filter(None, map(adapter_shapes, adapters)):
        check_one_rank(budget, shapes)


def load_adapters(*folders: Path) -> "dict[str, Adapter]":
    """Map names to adapters: the folders' names if they differ, otherwise their full paths."""
    named = {name_of(folder): folder for folder in folders}
    if len(named) < len(folders):
        named = {str(folder): folder for folder in folders}
    loaded = {name: load_adapter(folder) for name, folder in named.items()}
    for name, adapter in loaded.items():
        if adapter.copies:
            say(
                f"{name} contains copies of {', '.join(adapter.copies)}; this command does not compare them "
                "with a base"
            )
    return loaded


def name_of(folder: Path) -> str:
    """The name of an adapter's folder."""
    return folder.expanduser().resolve().name


def open_weights(base: str, trust_remote_code: bool) -> Any:
    """The weights of a base, read one tensor at a time if its files allow it."""
    from brushstroke.base import open_base

    return open_base(base, trust_remote_code=trust_remote_code)


def site_progress() -> Callable[[str, int, int], None]:
    """Progress messages at intervals, if the analysis takes long."""
    last = time.monotonic()

    def on_site(site: str, number: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"site {number} of {total}: {site}")

    return on_site


def report_cache_use(cache: "DirectionCache | None") -> None:
    """Report directions that came from the cache, or that they could not be stored."""
    if cache is None:
        return
    if cache.used:
        say(
            f"used cached directions of the base for {cache.used} sites, from {cache.folder} (--no-cache "
            "recomputes them)"
        )
    if cache.failure:
        say(f"could not cache the directions of the base: {cache.failure}")
