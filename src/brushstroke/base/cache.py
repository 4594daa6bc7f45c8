"""Creates empty key-value caches for models of transformers.

It does not fill them; the models do.
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
    """A cache whose rows can be selected, and the keyword argument that passes it to its model.

    Args:
        name: the keyword argument of the model.
        cache: the cache object of transformers.
        gaps: whether a masked gap between a row's tokens may work, so that a test is worthwhile: the model
            accepts positions, declares no sliding windows, and its rotary frequencies do not depend on the
            length.
    """

    name: str
    cache: Any
    gaps: bool

    @property
    def option(self) -> dict[str, Any]:
        """The keyword argument as a dict."""
        return {self.name: self.cache}

    def pick(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may occur several times."""
        self.cache.batch_select_indices(torch.tensor(rows))  # a CPU index works for layers on any device


def row_cache(model: nn.Module) -> RowCache | None:
    """An empty cache for a model of transformers.

    None if the model stores anything other than keys and values per row, for example a recurrent state or
    image positions.
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
    causal = all(
        getattr(module, "is_causal", True) for module in model.modules()
    )  # BERT and similar models are not
    fixed = dynamic_rope_limit(model) is None
    gaps = kinds == {DynamicLayer} and "position_ids" in known and causal and fixed
    return RowCache(name, cache, gaps)
