"""The frozen base model: the lowest place where transformers is known."""

from brushstroke.base.cache import CACHE_NAMES, RowCache, row_cache
from brushstroke.base.device import choose_device, choose_dtype, limit_kernel_caches, total_memory
from brushstroke.base.load import Base, load_base, load_tokenizer, quiet_transformers, require_base
from brushstroke.base.moving import forget_longest, moving_from, unmoved
from brushstroke.base.told import context_length, learnt_positions, model_dtype
from brushstroke.base.vocabulary import (
    VocabularyWarning,
    embedding_rows,
    has_embedding,
    refuse_unknown_tokens,
)
from brushstroke.base.weights import FolderWeights, ModelWeights, open_base

__all__ = [
    "CACHE_NAMES",
    "Base",
    "FolderWeights",
    "ModelWeights",
    "RowCache",
    "VocabularyWarning",
    "choose_device",
    "choose_dtype",
    "context_length",
    "embedding_rows",
    "forget_longest",
    "has_embedding",
    "learnt_positions",
    "limit_kernel_caches",
    "load_base",
    "load_tokenizer",
    "model_dtype",
    "moving_from",
    "open_base",
    "quiet_transformers",
    "refuse_unknown_tokens",
    "require_base",
    "row_cache",
    "total_memory",
    "unmoved",
]
