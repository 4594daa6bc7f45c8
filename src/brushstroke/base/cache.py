"""The key-value caches of transformers' models.

It fills none: the models do.
"""

import inspect
from typing import Any

from torch import nn

CACHE_NAMES = ("past_key_values", "cache")  # transformers renames the first to the second


def fresh_cache(model: nn.Module) -> tuple[str, Any]:
    """A cache to begin with, of which rows can be taken out, and the name under which the model takes it.

    The cache is None where the model keeps something else than keys and values of each row: a state, or
    positions of pictures.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config: Any = getattr(model, "config", None)
    known = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in known), "")
    text_only = hasattr(config, "get_text_config") and config.get_text_config() is config
    if not name or not text_only or getattr(model, "_is_stateful", False):
        return name, None
    cache = DynamicCache(config=config)
    kinds = {type(layer) for layer in cache.layers}
    plain = bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    return name, cache if plain else None
