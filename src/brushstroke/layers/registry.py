"""Lists which layer class runs which type of update in which kinds of layers; a new variant is one line.

It contains no layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from brushstroke.checks import check_choice
from brushstroke.errors import AttachError, ConfigError
from brushstroke.layers.adapted import Attached, Banked
from brushstroke.layers.dora import AttachedDoRA, BankedDoRA, DoRA, fresh_dora
from brushstroke.layers.embedding import AttachedEmbedding, BankedEmbedding, EmbeddingLowRank, fresh_embedding
from brushstroke.layers.fresh import Start, fresh_lora
from brushstroke.layers.linear import AttachedLinear, BankedLinear
from brushstroke.lowrank import LowRank, Update
from brushstroke.sites import Site


@dataclass(frozen=True)
class Variant:
    """One type of update in some kinds of layers.

    Args:
        name: the value of `LoraConfig.variant`.
        update: the type of the value.
        kinds: names of the kinds of layers.
        attached: the layer class for one adapter.
        banked: the layer class for a bank of them; None if a bank cannot hold this type.
        fresh: makes a new update.
    """

    name: str
    update: type[Update]
    kinds: tuple[str, ...]
    attached: type[Attached]
    banked: type[Banked] | None = None
    fresh: Callable[[Start], Update] = fresh_lora


VARIANTS = [
    Variant("lora", LowRank, ("linear", "conv1d"), AttachedLinear, BankedLinear),
    Variant("lora", EmbeddingLowRank, ("embedding",), AttachedEmbedding, BankedEmbedding, fresh_embedding),
    Variant("dora", DoRA, ("linear", "conv1d"), AttachedDoRA, BankedDoRA, fresh_dora),
]


def variant_of(path: str, update: Update, kind: str) -> Variant:
    """The variant that runs an update in a layer of this kind.

    Raises:
        AttachError: there is none.
    """
    for variant in VARIANTS:
        if variant.update is type(update) and kind in variant.kinds:
            return variant
    raise AttachError(f"{path}: a {type(update).__name__} cannot be attached to a layer of kind {kind!r}")


def variant_named(name: str, site: Site) -> Variant:
    """The variant of this name for a site.

    Raises:
        ConfigError: there is none of that name, or not for this kind of layer.
    """
    check_choice("variant", name, dict.fromkeys(variant.name for variant in VARIANTS))
    for variant in VARIANTS:
        if variant.name == name and site.kind in variant.kinds:
            return variant
    raise ConfigError(
        f"{site.path}: the variant {name!r} cannot adapt a layer of kind {site.kind!r}; leave it out"
    )


def banked_class(name: str, path: str, variant: Variant) -> type[Banked]:
    """The layer class that holds an adapter's update in a bank.

    Raises:
        AttachError: a bank cannot hold this type of update.
    """
    if variant.banked is None:
        raise AttachError(
            f"adapter {name!r} has a {variant.update.__name__} at {path}, which a bank cannot hold; attach "
            "it alone, or merge it"
        )
    return variant.banked
