"""The command `show`: the contents of an adapter; it needs no base."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brushstroke.cli.adapters import load_adapter
from brushstroke.cli.console import emit_json, facts, results, size, table
from brushstroke.errors import ShapeError

if TYPE_CHECKING:
    from brushstroke.adapter import Adapter

COLUMNS = ("site", "d×h", "rank", "scale", "norm", "sigma 1")
WITHOUT = ("scale", "d×h", "sigma 1")  # columns that a narrow terminal omits, in this order


def show(adapter: Path, *, json: bool = False) -> None:
    """Show the sites, ranks, norms and size of an adapter, and its card.

    Args:
        adapter: Folder or hub id of the adapter.
        json: Print JSON on stdout.
    """
    value = load_adapter(adapter)
    from brushstroke.analysis import arrange, natural

    sites = [_site(path, value[path]) for path in arrange(sorted(value, key=natural)).sites.values()]
    described = {
        "name": adapter.expanduser().resolve().name,
        "sites": sites,
        "rank": value.rank,
        "parameters": value.parameters,
        "bytes": value.bytes,
        "norm": _known(value.norm),
        "copies": list(value.copies),
        "card": _card(value),
    }
    if json:
        emit_json(described)
        return
    console = results()
    table(console, COLUMNS, [_row(site) for site in sites], leave_out=WITHOUT)
    _print(console, described)


def _site(path: str, update: Any) -> dict[str, Any]:
    sigma, scale = getattr(update, "sigma", None), getattr(update, "scale", None)
    return {
        "site": path,
        "shape": list(update.shape),
        "rank": getattr(update, "rank", None),
        "scale": scale if isinstance(scale, float) else None,
        "norm": _known(update.delta_norm),
        "top_singular_value": float(sigma[0]) if sigma is not None and len(sigma) else None,
        "dtype": str(update.dtype).removeprefix("torch."),
        "parameters": update.parameters,
    }


def _known(norm: Callable[[], float]) -> float | None:
    """A norm, or None if it depends on the base."""
    with suppress(ShapeError):
        return norm()
    return None


def _row(site: dict[str, Any]) -> tuple[str, ...]:
    d, h = ("any" if width == -1 else width for width in site["shape"])
    numbers = (site["scale"], site["norm"], site["top_singular_value"])
    cells = ("-" if number is None else f"{number:.4g}" for number in numbers)
    return (site["site"], f"{d}×{h}", str(site["rank"] or "-"), *cells)


def _card(value: "Adapter") -> dict[str, Any] | None:
    if value.card is None:
        return None
    card = {**value.card.as_dict(), "chat_template": value.card.chat_template}
    fingerprint = card.pop("fingerprint")
    return {**card, "fingerprint": None if fingerprint is None else f"of {len(value)} sites"}


def _print(console: Any, described: dict[str, Any]) -> None:
    card, copies = described["card"] or {}, described["copies"]
    lora, training = card.get("lora") or {}, dict(card.get("training") or {})
    versions = training.get("versions")
    if isinstance(versions, dict):
        training["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.print(described["name"], style="bold", markup=False)
    facts(
        console,
        {
            "sites": ", rank ".join(str(n) for n in (len(described["sites"]), described["rank"]) if n),
            "size": f"{described['parameters']:,} parameters, {size(described['bytes'])}",
            "norm": "depends on the base" if described["norm"] is None else f"{described['norm']:.4g}",
            "base": card.get("base_name") or "unknown",
            "copies": f"{', '.join(copies)}: will be compared with the base when the adapter is used"
            if copies
            else "",
            "asked for": ", ".join(f"{key} {_cell(v)}" for key, v in lora.items() if v not in (None, {}, [])),
            "targets": ", ".join(card.get("target_modules") or ()),
            "stop tokens": " ".join(card.get("stop_tokens") or ()),
            "chat template": f"{len(card['chat_template'])} characters"
            if card.get("chat_template")
            else "none",
            "fingerprint": card.get("fingerprint") or "none",
            **{key.replace("_", " "): _cell(value) for key, value in training.items()},
        },
    )


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
