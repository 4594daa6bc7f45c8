"""The key-value caches of transformers' models.

It fills none: the models do.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from brushstroke.base.dynamic_rope import dynamic_rope_limit
from brushstroke.base.model_facts import text_config

CACHE_NAMES = ("past_key_values", "cache")  # transformers renames the first to the second


@dataclass(frozen=True)
class RowCache:
    """A cache whose rows can be picked, and how its model takes it.

    Args:
        name: the keyword under which the model takes it.
        cache: transformers' own.
        gaps: whether it is worth trying that padding stands between a row's tokens: the model is told
            positions, declares no windows, and turns keys by frequencies that no length moves.
    """

    name: str
    cache: Any
    gaps: bool

    @property
    def option(self) -> dict[str, Any]:
        """The keyword argument."""
        return {self.name: self.cache}

    def pick(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may come several times."""
        self.cache.batch_select_indices(torch.tensor(rows))  # on the CPU, it serves layers of any device


def row_cache(model: nn.Module) -> RowCache | None:
    """An empty cache for a model of transformers.

    None where the model keeps something else than keys and values of each row: a state, or positions of
    pictures.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config: Any = getattr(model, "config", None)
    known = inspect.signature(model.forward).parameters
    name = next((name for name in CACHE_NAMES if name in known), None)
    text_only = hasattr(config, "get_text_config") and text_config(model) is config
    if name is None or not text_only or getattr(model, "_is_stateful", False):
        return None
    cache = DynamicCache(config=config)
    kinds = {type(layer) for layer in cache.layers}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    causal = all(getattr(module, "is_causal", True) for module in model.modules())  # BERT's kin are not
    fixed = dynamic_rope_limit(model) is None
    gaps = kinds == {DynamicLayer} and "position_ids" in known and causal and fixed
    return RowCache(name, cache, gaps)
