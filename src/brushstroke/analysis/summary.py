"""The summary of an analysis: one sentence, a table by kind of matrix, and a table by layer.

Does not define measures (`summaries` does); computes their means and standard deviations over sites.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from brushstroke.analysis.table import SiteTable, as_plain, kind_names
from brushstroke.analysis.text_tables import Listing, number

MOST_LAYERS = 12  # a table for people shows at most this many layers separately
RANGES = 3  # number of ranges in which it groups more layers
NO_LAYER = "–"
SPREAD = "mean ± standard deviation over the sites"
MOST_DIGITS = 6  # maximum number of digits after the decimal point of a mean, and before it

Value = Callable[[Any], float | None]


@dataclass(frozen=True)
class Measure:
    """A number that every site has.

    Args:
        name: the name in JSON.
        head: the column head in tables for people.
        value: computes the number from a site's result; None if the site has none.
        chance: the chance level: computed from a site's result, or one number for all sites.
        chance_head: the column head of a chance level that differs by site.
        form: the format of the number.
        counted: whether it is a count; tables for people show the sum over the sites, not the mean.
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
        """The heads of its columns in a table for people."""
        if callable(self.chance):
            return [self.head, self.chance_head]
        return [
            self.head if self.chance is None else f"{self.head} (chance\N{NO-BREAK SPACE}{self.chance:g})"
        ]

    def cells(self, found: "Average") -> list[str]:
        """The cells of those columns."""
        if self.counted:
            return [f"{found.total:g}"]
        mean = number(found.mean, self.form)
        if found.mean is not None and found.sd is not None:
            mean = with_deviation(found.mean, found.sd, self.form)
        return [mean, number(found.chance, self.form)] if callable(self.chance) else [mean]


@dataclass(frozen=True)
class Average:
    """A measure over several sites; sites without a value are ignored.

    Args:
        sites: the number of sites with a value.
        total: the sum of the values.
        mean: the mean of the values; None if there are none.
        sd: the standard deviation (n − 1); None for fewer than two values, or if one is infinite.
        chance: the mean chance level of these sites; None if there is none.
    """

    sites: int
    total: float
    mean: float | None
    sd: float | None
    chance: float | None


@dataclass(frozen=True)
class Part:
    """The averages of a group of sites, of one kind of matrix or of several layers: measure → average."""

    name: str
    sites: int
    averages: Mapping[str, Average]


@dataclass(frozen=True)
class Summary:
    """The result of an analysis.

    Args:
        sentence: the result with its numbers, and their chance levels if they have any.
        measures: the measures that are averaged.
        matrices: a part for each kind of matrix, in reading order.
        layers: a part for each layer; sites outside of layers form one part.
        ranges: the layers in tables for people: `layers`, or ranges of layers if there are many.
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
        """The tables for people; no table by layer if there is only one layer, and none without sites."""
        if not self.matrices:
            return {}
        found = {"matrices": self._listing("matrix", self.matrices)}
        if len(self.layers) > 1:
            found["layers"] = self._listing("layer" if self.ranges == self.layers else "layers", self.ranges)
        return found

    def _plain(self, part: Part) -> dict[str, Any]:
        """The averages of a part as JSON types; measures without a chance level have no key for it."""
        averages = as_plain(part.averages)
        for one in self.measures:
            if one.chance is None:
                del averages[one.name]["chance"]
        return {"sites": part.sites, **averages}

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
        part(name, lambda layer, _, group=group: layer in group)
        for name, group in _ranges(grid.layers).items()
    ]
    return Summary(sentence, tuple(measures), tuple(matrices), tuple(layers), tuple(ranges))


def average(measure: Measure, rows: Iterable[Any]) -> Average:
    """The average of a measure over the results of several sites.

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
    """A mean with its standard deviation: in a fixed format, or with two digits of the standard deviation.

    >>> with_deviation(17.4963, 0.1238, ".3g"), with_deviation(2.0, 0.0, ".3g")
    ('17.50 ± 0.12', '2 ± 0')
    >>> with_deviation(0.5, 0.1, ".3f"), with_deviation(-0.0004, 0.009, ".3f")
    ('0.500 ± 0.100', '0.000 ± 0.009')
    """
    if form.endswith("f"):
        return f"{mean:z{form}} ± {sd:{form}}"
    if sd <= abs(mean) * 1e-9:  # rounding
        return f"{mean:{form}} ± 0"
    digits = max(0, 1 - math.floor(math.log10(sd)))
    if digits > MOST_DIGITS or abs(mean) >= 10**MOST_DIGITS:
        return f"{mean:{form}} ± {sd:.2g}"
    return f"{mean:z.{digits}f} ± {sd:.{digits}f}"


def _chance(measure: Measure, rows: Iterable[Any]) -> float | None:
    chance = measure.chance
    if not callable(chance):
        return chance
    levels = [level for row in rows if (level := chance(row)) is not None]
    return fmean(levels) if levels else None


def _ranges(layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Name → layers: each layer separately, or a few ranges if there are many layers."""
    numbered = [layer for layer in layers if layer]
    outside = {NO_LAYER: [""]} if len(numbered) < len(layers) else {}
    if len(numbered) <= MOST_LAYERS:
        return outside | {layer: [layer] for layer in numbered}
    edges = [round(len(numbered) * part / RANGES) for part in range(RANGES + 1)]
    parts = [numbered[a:b] for a, b in pairwise(edges)]
    return outside | {f"{part[0]}–{part[-1]}": part for part in parts}
