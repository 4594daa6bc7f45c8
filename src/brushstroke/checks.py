"""Checks the arguments of analyses and studies that need only numbers, names and shapes.

It does not load torch or transformers, so that the command line can report such errors at once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from brushstroke.errors import ConfigError, ShapeError, did_you_mean

Shapes = Mapping[str, tuple[int, int]]  # site → (d, h)
_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # in a key or a site: the stack of layers, and the number of the layer


def check_dense_limit(dense_limit: int) -> None:
    """Check that the limit is not negative.

    Raises:
        ConfigError: it is negative.
    """
    if dense_limit < 0:
        raise ConfigError(f"dense_limit must not be negative; got {dense_limit}")


def check_intruder_settings(top: int, threshold: float) -> None:
    """Check the number of directions to compare, and the threshold of the cosine.

    Raises:
        ConfigError: top is below 1, or the threshold is outside (0, 1].
    """
    if top < 1 or not 0 < threshold <= 1:
        raise ConfigError(
            f"top must be at least 1 and the threshold above 0 and at most 1; got {top} and {threshold}"
        )


def check_share(share: float) -> None:
    """Check a share of the energy.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"a share of the energy must be above 0 and at most 1; got {share}")


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


def check_counts(name: str, values: Iterable[int]) -> None:
    """Check whole numbers of a study, such as ranks.

    Raises:
        ConfigError: one is below 1; the message gives the name.
    """
    for value in values:
        if value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1; got {value}")


def check_parameters(budget: int) -> None:
    """Check the number of trained parameters of a study's arms.

    Raises:
        ConfigError: it is below 1.
    """
    if budget < 1:
        raise ConfigError(f"the budget is a number of parameters, at least 1 (--budget); got {budget}")


def check_margin(margin: float) -> None:
    """Check a margin of equality.

    Raises:
        ConfigError: it is not a finite number above 0.
    """
    if not 0 < margin < float("inf"):
        raise ConfigError(
            f"the margin of equality must be a finite number above 0 (--margin); got {margin:g}"
        )


def check_minutes(minutes: float) -> None:
    """Check a time budget.

    Raises:
        ConfigError: it is not a number above 0.
    """
    if not minutes > 0:
        raise ConfigError(f"the budget must be minutes above 0 (--budget-minutes); got {minutes}")


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
