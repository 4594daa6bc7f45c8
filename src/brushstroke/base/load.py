"""Loads a frozen base model from a folder, a hub id or a GGUF file.

It trains nothing and attaches nothing.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from brushstroke.base.architecture import (
    Where,
    needs_own_code,
    read_architecture,
    refused_code,
    require_language_model,
)
from brushstroke.base.device import choose_device, choose_dtype, limit_kernel_caches
from brushstroke.base.dynamic_rope import check_max_length
from brushstroke.base.gguf_file import load_gguf, load_gguf_tokenizer
from brushstroke.base.model_facts import context_length, model_dtype
from brushstroke.base.quantisation import quantisation, unify_dtype, use_stored
from brushstroke.base.surplus import require_whole
from brushstroke.base.vocabulary import has_embedding, warn_of_unknown_tokens
from brushstroke.errors import BaseLoadError, BrushstrokeError, ConfigError
from brushstroke.locate import hub_if_needed, locate_base
from brushstroke.outputs import read_unreplaced
from brushstroke.sites.quantised import keep_packing

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class Base:
    """A frozen model and its tokenizer.

    Args:
        model: any nn.Module; `load_base` gives the model of transformers that the config names.
        tokenizer: a tokenizer of transformers, or None if the model has none.
        name: the name that the user gave for the base.
        quantised: whether the weights were stored in a quantised format, so that they only approximate the
            original.
    """

    model: nn.Module
    tokenizer: Any = None
    name: str | None = None
    quantised: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model; see `model_dtype`."""
        return model_dtype(self.model)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`."""
        return self.model.generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]


def require_base(base: Any) -> None:
    """Refuse a value that is not a `Base`, or a `Base` whose model is not a causal language model.

    Raises:
        ConfigError: it is a path, a bare model, a model of another kind, or something else.
    """
    if not isinstance(base, Base):
        raise ConfigError(
            f"expected a Base; got {type(base).__name__}: load one with load_base(...), or create one from a "
            "model and its tokenizer: Base(model, tokenizer)"
        )
    require_language_model(base.model, getattr(base.model, "config", None), base.name)


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Base:
    """Load a model and freeze it: evaluation mode, no gradients for its weights.

    `architectures` in the config of a folder or hub id names the class: a language model, a classifier, an
    encoder, a model of images or sound. Without that name the model is a causal language model.

    Args:
        name: a model folder, a `.gguf` file (or a folder with exactly one and no config.json), or a hub id.
        dtype: "auto" (see `choose_dtype`), "float32", "bfloat16" or "float16".
        device: "auto" (see `choose_device`), "cpu", "cuda" or "mps".
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the model's own code, if it has any.
        quantize: "nf4" stores the weights of linear layers in 4 bits (NF4 of bitsandbytes, with double
            quantisation; arXiv:2305.14314), one layer after the other; the head and embeddings keep `dtype`.
            None loads the weights as they are stored, also if the folder's config says that they are
            quantised.

    Raises:
        BaseLoadError: there is no such model, it is damaged or incomplete, it contains weights that its class
            does not have, or it needs remote code.
        ConfigError: an unknown dtype, device or quantisation.
        MissingPackageError: a GGUF file without the gguf extra, or a quantised model without the quant extra.
    """
    limit_kernel_caches()
    target = choose_device(device)
    weights_dtype, _ = choose_dtype(dtype, target)
    source = locate_base(str(name))
    where = _where(name, source, revision, trust_remote_code)
    options = {
        "dtype": weights_dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, with their names
    }
    if quantize is not None:
        options |= quantisation(quantize, weights_dtype, target)

    def read() -> tuple[Any, Any, Any]:
        if source is not None and source.suffix == ".gguf":
            return load_gguf(source, trust_remote_code=False, **options)
        made, config = read_architecture(where)
        tokenizer = _load_tokenizer(where)
        options.update(use_stored(str(name), config, weights_dtype, target, quantize))
        return *made.from_pretrained(**where, config=config, **options), tokenizer

    with (
        hub_if_needed(str(name), source, revision),
        quiet_transformers(),
        _explained(str(name), source, where),
    ):
        model, report, tokenizer = read() if source is None else read_unreplaced(source, read)
    _refuse_other_weights(str(name), model, report)
    quantised = bool(
        (source is not None and source.suffix == ".gguf") or getattr(model, "hf_quantizer", None)
    )
    if source is None or source.suffix != ".gguf":  # for GGUF, transformers adds tokens of its own
        warn_of_unknown_tokens(model, tokenizer, str(name))
    if tokenizer is not None and not has_embedding(model, tokenizer.pad_token_id):
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model, "hf_quantizer", None):
        unify_dtype(model, weights_dtype)
        keep_packing(model)
    model.requires_grad_(False).eval()
    if target != torch.device("cpu") and not getattr(model, "hf_quantizer", None):
        model.to(target)
    if quantised:
        model.brushstroke_quantised = True  # type: ignore[assignment]
    return Base(model, tokenizer, str(name), quantised)


def load_tokenizer(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = None,
) -> tuple[Any, int | None]:
    """The tokenizer of a language model (None if it has none) and its context length; loads no weights.

    Args:
        name: as in `load_base`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run the model's own code, if it has any.
        max_length: maximum example length in tokens, which is checked against the context.

    Raises:
        BaseLoadError: there is no such base, it is damaged, or it needs remote code.
        ConfigError: it is not a causal language model, or `max_length` exceeds its context.
        MissingPackageError: a GGUF file without the gguf extra.
    """
    source = locate_base(str(name))
    where = _where(name, source, revision, trust_remote_code)
    with (
        hub_if_needed(str(name), source, revision),
        quiet_transformers(),
        _explained(str(name), source, where),
    ):
        if source is not None and source.suffix == ".gguf":
            tokenizer, config = load_gguf_tokenizer(source)
        else:
            made, config = read_architecture(where)
            require_language_model(made, config, str(name))
            tokenizer = _load_tokenizer(where)
    check_max_length(config, max_length)
    return tokenizer, context_length(config)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context manager: transformers and the hub client show no progress bars and log errors only."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    bars, level, hub_level = (
        logging.is_progress_bar_enabled(),
        logging.get_verbosity(),
        hub_logging.get_verbosity(),
    )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)


def _where(name: str | Path, source: Path | None, revision: str | None, trust_remote_code: bool) -> Where:
    return {
        "pretrained_model_name_or_path": str(source or name),
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
    }


def _load_tokenizer(where: Where) -> Any:
    """The tokenizer, or None without tokenizer files: transformers would create an empty one."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import has_file

    name, revision = where["pretrained_model_name_or_path"], where["revision"]
    if not any(has_file(name, file, revision) for file in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(**where)


def _refuse_other_weights(name: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuse files that lack a weight (it would be random) or contain one that the class does not have."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BaseLoadError(
            f"the folder {name} contains a base and an adapter; give the base alone and the adapter as "
            "--adapter"
        )
    require_whole(
        name,
        model,
        missing=report.get("missing_keys") or (),
        mismatched=report.get("mismatched_keys") or (),
        unexpected=report.get("unexpected_keys") or (),
    )


@contextmanager
def _explained(name: str, source: Path | None, where: Where) -> Iterator[None]:
    """Context manager: turn any exception of transformers into a one-line error about this base."""
    try:
        yield
    except (BrushstrokeError, MemoryError):
        raise
    except Exception as error:
        if needs_own_code(error):
            raise refused_code(where, "its tokenizer") from error
        raise _explain(name, source, error) from error


def _explain(name: str, source: Path | None, error: Exception) -> BaseLoadError:
    detail = " ".join(str(error).split()) or type(error).__name__
    detail = detail if len(detail) <= 300 else detail[:300] + " ..."
    if source is None:
        return BaseLoadError(
            f"cannot load {name!r} from the Hugging Face hub ({detail}); there is no folder with that name "
            f"either: check the spelling and the network"
        )
    if isinstance(error, json.JSONDecodeError):
        detail = f"invalid JSON: {detail}"
    return BaseLoadError(
        f"cannot load the model in {name} ({type(error).__name__}: {detail}); fetch it again, or check "
        f"that this version of transformers supports the model"
    )
