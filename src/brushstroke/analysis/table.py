"""The common form of all results of an analysis: a mapping from sites to frozen values, and plain data.

Does not compute results.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from brushstroke.errors import did_you_mean

Row = TypeVar("Row")
HIDDEN = {"plain": False}  # metadata of a field that `as_plain` omits
# words in module names, in reading order
_ATTENTION = ({"q", "query"}, {"v", "value"}, {"o", "out"}, {"k", "key"})
_FEED_FORWARD = ({"gate"}, {"up"}, {"down"})
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class SiteTable(Mapping[str, Row]):
    """An immutable mapping from site paths to results."""

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = dict(rows)

    def __getitem__(self, site: str) -> Row:
        try:
            return self._rows[site]
        except KeyError:
            raise KeyError(self._absent(site)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} sites)"

    def _absent(self, site: str) -> str:
        return f"no result for the site {site!r}{did_you_mean(site, self._rows)}"

    def ordered(self) -> list[tuple[str, Row]]:
        """The rows layer by layer, in each layer in reading order: q and v first."""
        return [(site, self[site]) for site in self.grid().sites.values()]

    def grid(self) -> "Grid":
        """The sites as a map of layers and matrices."""
        return arrange(sorted(self, key=natural))

    def totals(self) -> dict[str, Any]:
        """Results over all sites together."""
        return {}

    def as_dict(self) -> dict[str, Any]:
        """JSON types: the totals, and under "sites" each site with its numbers."""
        sites = [{"site": site, **as_plain(row)} for site, row in self.ordered()]
        return {**as_plain(self.totals()), "sites": sites}


def as_plain(value: Any) -> Any:
    """A result as JSON types: tensors as lists, non-finite values as None, without hidden fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        more = getattr(value, "derived", dict)()
        kept = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.metadata.get("plain", True)
        }
        return as_plain({**kept, **more})
    if isinstance(value, Mapping):
        return {str(name): as_plain(part) for name, part in value.items()}
    if isinstance(value, Tensor):
        return as_plain(value.tolist())
    if isinstance(value, list | tuple):
        return [as_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def natural(path: str) -> list[tuple[int, str]]:
    """A sort key that places layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in path.split(".")]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Sites as a map: one row for each layer, one column for each kind of matrix.

    Args:
        layers: the numbers in the paths, ascending; "" for sites outside of layers.
        matrices: the paths without the layer number and without their common prefix; of each attention block
            q, v, o and k in this order, then gate, up and down, and the rest.
        sites: (layer, matrix) → site, layer by layer, in each layer in the order of `matrices`.
    """

    layers: tuple[str, ...]
    matrices: tuple[str, ...]
    sites: Mapping[tuple[str, str], str]


def arrange(sites: Iterable[str]) -> Grid:
    """The map of these sites.

    >>> grid = arrange(["model.layers.0.attn.q", "model.layers.0.mlp.up", "model.layers.10.attn.q"])
    >>> grid.layers, grid.matrices
    (('0', '10'), ('attn.q', 'mlp.up'))
    """
    cells: dict[tuple[str, str], str] = {}
    for site in sites:
        match = _NUMBER.search(site)
        layer = match[0] if match else ""
        cells[layer, _NUMBER.sub("*", site, count=1)] = site
    columns = reading_order(dict.fromkeys(column for _, column in cells))
    heads = {column.partition("*")[0] for column in columns if "*" in column}
    common = f"{heads.pop()}*." if len(heads) == 1 else ""
    names = {column: column.removeprefix(common) if common else column for column in columns}
    if len(set(names.values())) < len(columns):
        names = {column: column for column in columns}
    layers = sorted({layer for layer, _ in cells}, key=lambda text: int(text) if text else -1)
    placed = {
        (layer, names[column]): cells[layer, column]
        for layer in layers
        for column in columns
        if (layer, column) in cells
    }
    return Grid(tuple(layers), tuple(names[column] for column in columns), placed)


def reading_order(matrices: Iterable[str]) -> list[str]:
    """Kinds of matrices in reading order: q, v, o and k of attention, then gate, up and down, and the rest.

    >>> reading_order(["mlp.down_proj", "mlp.up_proj", "attn.k_proj", "attn.q_proj", "attn.v_proj"])
    ['attn.q_proj', 'attn.v_proj', 'attn.k_proj', 'mlp.up_proj', 'mlp.down_proj']
    """
    given = list(matrices)
    parents = {name: name.rpartition(".")[0] for name in given}
    blocks = list(dict.fromkeys(parents.values()))
    attention = {parents[name] for name in given if "att" in name.lower() or _ATTENTION[0] & _words(name)}

    def key(name: str) -> tuple[int, int]:
        inside = parents[name] in attention
        kinds = _ATTENTION if inside else _FEED_FORWARD
        kind = next((at for at, words in enumerate(kinds) if words & _words(name)), len(kinds))
        return blocks.index(parents[name]) + (0 if inside else len(blocks)), kind

    return sorted(given, key=key)


def side_by_side(matrices: Sequence[str]) -> list[tuple[str, ...]]:
    """Neighbours in the reading order as pairs for a figure: q with v, o with k, and so on.

    >>> side_by_side(["q", "v", "o", "k", "up"])
    [('q', 'v'), ('o', 'k'), ('up',)]
    """
    return [tuple(matrices[at : at + 2]) for at in range(0, len(matrices), 2)]


def short_names(matrices: Sequence[str]) -> dict[str, str]:
    """Kind of matrix → the last part of its name, or the complete name if last parts repeat."""
    last = {name: name.rsplit(".", 1)[-1] for name in matrices}
    return last if len({*last.values()}) == len(last) else {name: name for name in matrices}


def kind_names(matrices: Sequence[str]) -> dict[str, str]:
    """Matrix → the name of its kind in a table: the same for all experts, and short if short names differ.

    >>> kind_names(["attn.q", "experts.0.up", "experts.1.up"])
    {'attn.q': 'q', 'experts.0.up': 'up', 'experts.1.up': 'up'}
    """
    kinds = {name: _NUMBER.sub("*", name) for name in matrices}
    short = short_names(list(dict.fromkeys(kinds.values())))
    return {name: short[kind] if kind != "*" else "all" for name, kind in kinds.items()}


def _words(name: str) -> set[str]:
    return {*re.split(r"[._]", name.lower())}
