"""Loads the frozen base model; the lowest package that imports transformers.

It attaches no adapter and trains nothing.
"""

from brushstroke.base.architecture import require_language_model
from brushstroke.base.cache import CACHE_NAMES, RowCache, row_cache
from brushstroke.base.device import choose_device, choose_dtype, limit_kernel_caches, total_memory
from brushstroke.base.dynamic_rope import (
    check_max_length,
    dynamic_rope_limit,
    preserved_rope,
    reset_dynamic_rope,
)
from brushstroke.base.load import Base, load_base, load_tokenizer, quiet_transformers, require_base
from brushstroke.base.model_facts import (
    context_length,
    embedding_rows,
    hidden_size,
    learnt_positions,
    model_dtype,
    text_config,
    vocabulary_size,
)
from brushstroke.base.quantisation import forget_quantisation
from brushstroke.base.vocabulary import (
    VocabularyWarning,
    has_embedding,
    refuse_unknown_tokens,
)
from brushstroke.base.weights import FolderWeights, open_base

__all__ = [
    "CACHE_NAMES",
    "Base",
    "FolderWeights",
    "RowCache",
    "VocabularyWarning",
    "check_max_length",
    "choose_device",
    "choose_dtype",
    "context_length",
    "dynamic_rope_limit",
    "embedding_rows",
    "forget_quantisation",
    "has_embedding",
    "hidden_size",
    "learnt_positions",
    "limit_kernel_caches",
    "load_base",
    "load_tokenizer",
    "model_dtype",
    "open_base",
    "preserved_rope",
    "quiet_transformers",
    "refuse_unknown_tokens",
    "require_base",
    "require_language_model",
    "reset_dynamic_rope",
    "row_cache",
    "text_config",
    "total_memory",
    "vocabulary_size",
]
