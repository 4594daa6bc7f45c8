"""The command `cache`: what is kept on disk to save time, and its removal."""

import shutil
from pathlib import Path
from typing import Any, Literal

from brushstroke.cli.console import emit_json, print_text, results, say, size, table
from brushstroke.outputs import remove_empty, size_of

COLUMNS = ("part", "holds", "entries", "size", "at most")
WITHOUT = ("holds", "at most")  # columns that a narrow terminal omits, in this order
PARTS = {
    "data": "indices and tokens of large data",
    "gguf": "models read from GGUF files",
    "directions": "singular directions of base weights",
    "samples": "the model and the data of the demo and the tests",
}


def cache(
    *, clear: Literal["data", "gguf", "directions", "samples", "all"] | None = None, json: bool = False
) -> None:
    """Show what is kept on disk to save time, or remove it; everything in it is made again when needed.

    Args:
        clear: Remove this part.
        json: Print JSON on stdout.
    """
    from brushstroke.analysis.directions import LIMIT as DIRECTIONS
    from brushstroke.base.gguf_cache import LIMIT as GGUF
    from brushstroke.data.cache import LIMIT as DATA
    from brushstroke.data.cache import clear_leftovers
    from brushstroke.samples.assets import cache_folder

    folder = cache_folder()
    clear_leftovers()
    limits = {"data": DATA, "gguf": GGUF, "directions": DIRECTIONS, "samples": None}
    parts = {name: _entries(folder, name) for name in PARTS}
    cleared = 0
    for name in PARTS if clear == "all" else [clear] if clear else []:
        for entry in parts[name]:
            cleared += size_of(entry)
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            remove_empty(entry.parent)
        parts[name] = []
    described = [
        {
            "part": name,
            "entries": len(entries),
            "bytes": sum(map(size_of, entries)),
            "limit_bytes": limits[name],
        }
        for name, entries in parts.items()
    ]
    if json:
        emit_json({"folder": str(folder), "parts": described, "cleared_bytes": cleared})
        return
    if clear:
        say(f"removed {size(cleared)}")
    console = results()
    table(console, COLUMNS, [_row(part) for part in described], leave_out=WITHOUT)
    print_text(console, f"in {folder}")


def _entries(folder: Path, part: str) -> list[Path]:
    """The files or folders of a part; nothing that was not put there to be kept."""
    from brushstroke.analysis.directions import SUFFIX
    from brushstroke.base import gguf_cache
    from brushstroke.data import cache as data_cache
    from brushstroke.samples.assets import LABELLED, MODEL

    if part == "gguf":
        return gguf_cache.entries()
    if part == "data":
        return data_cache.entries()
    if part == "directions":
        return sorted((folder / part).glob(f"*{SUFFIX}"))
    return sorted(asset.path for asset in (MODEL, *LABELLED.values()) if asset.path.is_file())


def _row(part: dict[str, Any]) -> tuple[str, ...]:
    limit = "–" if part["limit_bytes"] is None else size(part["limit_bytes"])
    return part["part"], PARTS[part["part"]], str(part["entries"]), size(part["bytes"]), limit
