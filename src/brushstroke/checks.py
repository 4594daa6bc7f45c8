"""Checks of what an analysis is asked, by numbers, names and shapes alone.

Neither torch nor transformers is loaded, so that the command line can refuse in an instant what the analysis
itself would refuse.
"""

import re
from collections.abc import Mapping

from brushstroke.errors import ConfigError, ShapeError, did_you_mean

Shapes = Mapping[str, tuple[int, int]]  # site → (d, h)
_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # the stack that a key or a site is in, and the number of its layer


def check_dense_limit(dense_limit: int) -> None:
    """Refuse a negative limit.

    Raises:
        ConfigError: it is negative.
    """
    if dense_limit < 0:
        raise ConfigError(f"dense_limit must not be negative; got {dense_limit}")


def check_intruder_settings(top: int, threshold: float) -> None:
    """Refuse to judge no direction, and a threshold that no cosine or every one is below.

    Raises:
        ConfigError: top below 1, or a threshold outside (0, 1].
    """
    if top < 1 or not 0 < threshold <= 1:
        raise ConfigError(
            f"top must be at least 1 and the threshold above 0 and at most 1; got {top} and {threshold}"
        )


def check_share(share: float) -> None:
    """Refuse what is no share of an energy.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"a share of the energy must be above 0 and at most 1; got {share}")


def check_alike(ones: Shapes, twos: Shapes) -> None:
    """Refuse two adapters that cannot be compared.

    Raises:
        ShapeError: they have no site in common, or a common one of different shapes.
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
    """The error for a W of another shape than its update."""
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
    """Refuse a base whose files certainly do not fit an adapter; what is not certain is told later.

    A model may rename, fuse, split or tie tensors while it is loaded, and store a weight as (d, h) or (h, d).
    So what is refused is a weight of the site's own name and neither shape, a layer of which the files hold
    nothing though they hold others of its stack, and a site with as many inputs as no tensor's side is long.

    Args:
        sites: of the adapter.
        stored: tensor key → shape, of all of the base's files; nothing is refused where it is empty.

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
