"""Results of an analysis in small: a table by kind of matrix and one by layer, under one sentence.

It computes no measure of its own, only means and deviations over sites; `summaries` says of what.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from brushstroke.analysis.table import SiteTable, as_plain, kind_names
from brushstroke.analysis.text_tables import Listing, number

MOST_LAYERS = 12  # that a table for people shows one by one
RANGES = 3  # as which it shows more of them
NO_LAYER = "–"
SPREAD = "mean ± standard deviation over the sites"
MOST_DIGITS = 6  # behind the point of a mean, and before it

Value = Callable[[Any], float | None]


@dataclass(frozen=True)
class Measure:
    """A number of every site.

    Args:
        name: for programs.
        head: for people.
        value: of a site's result; None where it has none.
        chance: what chance gives at a site, or everywhere.
        chance_head: of it, for people, where it is of a site.
        form: how it is written.
        counted: it counts something, so that people read its sum over the sites instead of the mean.
    """

    name: str
    head: str
    value: Value
    chance: Value | float | None = None
    chance_head: str = "chance"
    form: str = ".3g"
    counted: bool = False

    @property
    def heads(self) -> list[str]:
        """The columns of it in a table for people."""
        if callable(self.chance):
            return [self.head, self.chance_head]
        return [
            self.head if self.chance is None else f"{self.head} (chance\N{NO-BREAK SPACE}{self.chance:g})"
        ]

    def cells(self, found: "Average") -> list[str]:
        """What stands in those columns."""
        if self.counted:
            return [f"{found.total:g}"]
        told = number(found.mean, self.form)
        if found.mean is not None and found.sd is not None:
            told = with_deviation(found.mean, found.sd, self.form)
        return [told, number(found.chance, self.form)] if callable(self.chance) else [told]


@dataclass(frozen=True)
class Average:
    """A measure over some sites; those without a value do not count.

    Args:
        sites: how many have a value.
        total: their sum.
        mean: their mean; None without any.
        sd: their standard deviation (n − 1); None of fewer than two, or where one is infinite.
        chance: the mean of what chance gives there; None where there is no chance level.
    """

    sites: int
    total: float
    mean: float | None
    sd: float | None
    chance: float | None


@dataclass(frozen=True)
class Part:
    """Some sites together, of one kind of matrix or of some layers: measure → average."""

    name: str
    sites: int
    averages: Mapping[str, Average]


@dataclass(frozen=True)
class Summary:
    """What an analysis found.

    Args:
        sentence: with its numbers, and with their chance levels where there are such.
        measures: what is averaged.
        matrices: a part for each kind of matrix, in reading order.
        layers: a part for each layer; sites outside of layers are one.
        ranges: the layers for people: the same, or ranges of them where there are many.
    """

    sentence: str
    measures: tuple[Measure, ...]
    matrices: tuple[Part, ...]
    layers: tuple[Part, ...]
    ranges: tuple[Part, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON types, with every layer."""
        return {
            "sentence": self.sentence,
            "matrices": [{"matrix": part.name, **self._plain(part)} for part in self.matrices],
            "layers": [{"layer": part.name, **self._plain(part)} for part in self.layers],
        }

    def listings(self) -> dict[str, Listing]:
        """The tables for people; none by layer where there is but one, and none at all without a site."""
        if not self.matrices:
            return {}
        found = {"matrices": self._listing("matrix", self.matrices)}
        if len(self.layers) > 1:
            found["layers"] = self._listing("layer" if self.ranges == self.layers else "layers", self.ranges)
        return found

    def _plain(self, part: Part) -> dict[str, Any]:
        """An average without a chance level says nothing of one."""
        told = as_plain(part.averages)
        for one in self.measures:
            if one.chance is None:
                del told[one.name]["chance"]
        return {"sites": part.sites, **told}

    def _listing(self, kind: str, parts: Sequence[Part]) -> Listing:
        heads = [head for one in self.measures for head in one.heads]
        cells = [
            [cell for one in self.measures for cell in one.cells(part.averages[one.name])] for part in parts
        ]
        rows = [[part.name, str(part.sites), *row] for part, row in zip(parts, cells, strict=True)]
        return Listing([kind, "sites", *heads], rows)


def summary(sentence: str, measures: Sequence[Measure], found: SiteTable[Any]) -> Summary:
    """The measures of all sites, by kind of matrix and by layer."""
    grid = found.grid()
    kinds = kind_names(grid.matrices)

    def part(name: str, chosen: Callable[[str, str], bool]) -> Part:
        rows = [found[site] for cell, site in grid.sites.items() if chosen(*cell)]
        return Part(name, len(rows), {one.name: average(one, rows) for one in measures})

    matrices = [
        part(one, lambda _, matrix, one=one: kinds[matrix] == one) for one in dict.fromkeys(kinds.values())
    ]
    layers = [part(one or NO_LAYER, lambda layer, _, one=one: layer == one) for one in grid.layers]
    ranges = [
        part(name, lambda layer, _, some=some: layer in some) for name, some in _ranges(grid.layers).items()
    ]
    return Summary(sentence, tuple(measures), tuple(matrices), tuple(layers), tuple(ranges))


def average(measure: Measure, rows: Iterable[Any]) -> Average:
    """A measure over the results of some sites.

    >>> average(Measure("size", "size", float), [1, 3]).mean
    2.0
    """
    pairs = [(value, row) for row in rows if (value := measure.value(row)) is not None]
    if not pairs:
        return Average(0, 0.0, None, None, None)
    values = [float(value) for value, _ in pairs]
    sd = stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    chance = _chance(measure, [row for _, row in pairs])
    return Average(len(pairs), sum(values), fmean(values), sd, chance)


def with_deviation(mean: float, sd: float, form: str) -> str:
    """A mean with its standard deviation: both of a fixed form, or to the second digit of the latter.

    >>> with_deviation(17.4963, 0.1238, ".3g"), with_deviation(2.0, 0.0, ".3g")
    ('17.50 ± 0.12', '2 ± 0')
    >>> with_deviation(0.5, 0.1, ".3f")
    '0.500 ± 0.100'
    """
    if form.endswith("f"):
        return f"{mean:{form}} ± {sd:{form}}"
    if sd <= abs(mean) * 1e-9:  # rounding
        return f"{mean:{form}} ± 0"
    digits = max(0, 1 - math.floor(math.log10(sd)))
    if digits > MOST_DIGITS or abs(mean) >= 10**MOST_DIGITS:
        return f"{mean:{form}} ± {sd:.2g}"
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def _chance(measure: Measure, rows: Iterable[Any]) -> float | None:
    chance = measure.chance
    if not callable(chance):
        return chance
    levels = [level for row in rows if (level := chance(row)) is not None]
    return fmean(levels) if levels else None


def _ranges(layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Name → layers: each by itself, or as few ranges where there are many."""
    numbered = [layer for layer in layers if layer]
    outside = {NO_LAYER: [""]} if len(numbered) < len(layers) else {}
    if len(numbered) <= MOST_LAYERS:
        return outside | {layer: [layer] for layer in numbered}
    edges = [round(len(numbered) * part / RANGES) for part in range(RANGES + 1)]
    parts = [numbered[a:b] for a, b in pairwise(edges)]
    return outside | {f"{part[0]}–{part[-1]}": part for part in parts}
