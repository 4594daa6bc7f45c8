"""Checks arguments for which numbers, names and shapes are enough.

It does not load torch or transformers, so that the command line can report such errors at once.
"""

import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from brushstroke.errors import ConfigError, DataError, ShapeError, did_you_mean

Shapes = Mapping[str, tuple[int, int]]  # site → (d, h)
_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # in a key or a site: the stack of layers, and the number of the layer


def check_integer(name: str, value: Any, lowest: int = 1, highest: int | None = None) -> None:
    """Check a whole number, such as a rank.

    Raises:
        ConfigError: it is not one, or not in this range; the message gives the name.
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < lowest or (highest is not None and value > highest):
        limits = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ConfigError(f"{name} must be a whole number {limits}; got {value!r}")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Check a finite number, such as a margin or a share.

    Raises:
        ConfigError: it is not one, or not within the limits; the message gives the name.

    >>> check_number("a share", 0.5, above=0, at_most=1)
    """
    compare = {
        "above": operator.gt,
        "of at least": operator.ge,
        "of at most": operator.le,
        "below": operator.lt,
    }
    limits = dict(zip(compare, (above, at_least, at_most, below), strict=True))
    given = {word: limit for word, limit in limits.items() if limit is not None}
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    if not (is_number and all(compare[word](value, limit) for word, limit in given.items())):
        shown = " and ".join(f"{word} {limit:.2g}" for word, limit in given.items())
        raise ConfigError(f"{name} must be a finite number {shown}; got {value!r}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Check a value that must be one of several names.

    Raises:
        ConfigError: it is not; the message lists the names.
    """
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}{hint}")


def check_one_rank(parameters: int, sites: Shapes) -> None:
    """Check that a number of parameters is sufficient for rank 1 at one of the sites.

    Raises:
        ConfigError: it is too small.
    """
    cheapest = min(d + h for d, h in sites.values())
    if parameters < cheapest:
        raise ConfigError(
            f"a budget of {parameters:,} parameters is too small for one rank; give at least {cheapest:,}"
        )


def refuse_evaluation(keep_best: bool | None, eval_every: int | None, patience: int | None = None) -> None:
    """Refuse settings of a run that need evaluation data, if there is none.

    Raises:
        ConfigError: one of them is set.
    """
    given = {"keep_best": keep_best, "eval_every": eval_every is not None, "patience": patience is not None}
    for name, is_given in given.items():
        if is_given:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{name} ({flag}) needs evaluation data; give eval_data (--eval DATA)")


def check_rates(rates: Sequence[float]) -> None:
    """Check the learning rates that a study chooses from.

    Raises:
        ConfigError: there are fewer than two, or one is not a finite number above 0.
    """
    if len(set(rates)) < 2:
        raise ConfigError(
            "a study needs at least two learning rates, better three, so that the best one can lie between "
            "others; give more (--learning-rates)"
        )
    if any(not 0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"learning rates must be finite numbers above 0; got {', '.join(map(str, rates))}")


def check_sets(sets: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Check the sets of matrices that a study compares: (name, members) of each.

    Raises:
        ConfigError: there are fewer than two, or two have the same members.
    """
    named: dict[frozenset[str], str] = {}
    for name, members in sets:
        if (same := frozenset(members)) in named:
            raise ConfigError(
                f"two sets have the same matrices: {named[same]} and {name}; leave out one of them (--sets)"
            )
        named[same] = name
    if len(named) < 2:
        raise ConfigError("the study compares sets of matrices; give at least two (--sets)")


def check_new_rows(name: str, new: Collection[Any]) -> None:
    """Check that a control of a study has rows that the task does not have.

    Raises:
        DataError: it has none; the message gives its name.
    """
    if not new:
        raise DataError(f"{name}: every row is in the task's data too; give data with other rows")


def check_alike(ones: Shapes, twos: Shapes) -> None:
    """Check that two adapters can be compared.

    Raises:
        ShapeError: they have no site in common, or a common site has different shapes.
    """
    shared = [site for site in ones if site in twos]
    if not shared:
        near = did_you_mean(next(iter(ones)), twos, count=1)
        raise ShapeError(
            f"the adapters have no site in common; the first has {next(iter(ones))!r} and {len(ones) - 1} "
            f"others, the second {next(iter(twos))!r} and {len(twos) - 1} others{near}"
        )
    wrong = [f"{site}: {ones[site]} and {twos[site]}" for site in shared if ones[site] != twos[site]]
    if wrong:
        raise ShapeError(
            f"the adapters belong to bases of different shapes at {len(wrong)} sites:\n  "
            + "\n  ".join(wrong[:10])
        )


def misshapen(site: str, shape: tuple[int, int], found: tuple[int, ...]) -> ShapeError:
    """The error for a W whose shape differs from its update's."""
    return ShapeError(
        f"{site}: W must be (d, h) = {shape}; the base's is {found} (torch's Linear.weight is the transpose)"
    )


def lacking(absent: list[str], total: int, at_least: str = "") -> ShapeError:
    """The error for sites that a base does not have."""
    return ShapeError(
        f"the base lacks {at_least}{len(absent)} of {total} adapted sites; analyse an adapter with the base "
        "that it was trained on:\n  " + "\n  ".join(absent[:10])
    )


def check_stored(sites: Shapes, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a base's files can fit an adapter; cases that are not certain are checked after loading.

    A model may rename, fuse, split or tie tensors while it is loaded, and may store a weight as (d, h) or
    (h, d). An error is therefore certain only in three cases: a weight with the site's name has neither
    shape; the files hold no tensor of a layer, but some of other layers in its stack; or no tensor has a side
    as long as the site's input width.

    Args:
        sites: of the adapter.
        stored: tensor key → shape, of all of the base's files; if it is empty, nothing is checked.

    Raises:
        ShapeError: the base does not fit.
    """
    layers = {match.groups() for key in stored if (match := _LAYER.match(key))}
    stacks = {stack for stack, _ in layers}
    sides = {side for shape in stored.values() for side in shape}
    absent = []
    for site, (d, h) in sites.items():
        forms = (site, site.partition(".")[2])  # the second without the base model's prefix
        shape = next((stored[f"{form}.weight"] for form in forms if f"{form}.weight" in stored), None)
        if shape is not None and len(shape) == 2 and sorted(shape) != sorted((d, h)):
            raise misshapen(site, (d, h), shape[::-1])
        places = [match.groups() for form in forms if (match := _LAYER.match(form))]
        numbered = [place in layers for place in places if place[0] in stacks]
        if stored and (d not in sides or (numbered and not any(numbered))):
            absent.append(site)
    if absent:
        raise lacking(absent, len(sites), "at least ")
