"""Loads a GGUF file through transformers as a dequantised model, without progress bars.

It does not parse the format; transformers and the gguf package do.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn

from brushstroke.base import gguf_cache
from brushstroke.base.quantisation import forget_quantisation
from brushstroke.errors import BaseLoadError, require


def load_gguf(path: Path, **options: Any) -> tuple[nn.Module, dict[str, Any], Any]:
    """The model of a GGUF file, dequantised, with transformers' loading report and the file's tokenizer.

    Raises:
        BaseLoadError: the file is not a GGUF file.
        MissingPackageError: the gguf extra is not installed.
    """
    gguf = _open(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    key = gguf_cache.key_of(path)
    loaded: Any
    if "quantization_config" in options and gguf_cache.find(key, options["dtype"]) is None:
        load_gguf(
            path, **{n: v for n, v in options.items() if n not in ("quantization_config", "device_map")}
        )
        if gguf_cache.find(key, options["dtype"]) is None:
            raise BaseLoadError(
                f"{path} can be quantised only from the cache of GGUF models, and it does not fit there; "
                "save it as a folder (load_base(...).model.save_pretrained(...)), and quantise that"
            )
    if kept := gguf_cache.find(key, options["dtype"]):
        loaded = AutoModelForCausalLM.from_pretrained(kept, **options)
        return *loaded, AutoTokenizer.from_pretrained(kept)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _header_read_once(gguf):
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(**where, **_unpack_weights(), **options)
    model, report = loaded
    forget_quantisation(model)
    gguf_cache.keep(key, path, model, tokenizer)
    return model, report, tokenizer


def load_gguf_tokenizer(path: Path) -> tuple[Any, Any]:
    """The tokenizer and the config of a GGUF file, without its weights.

    Raises:
        BaseLoadError: the file is not a GGUF file.
        MissingPackageError: the gguf extra is not installed.
    """
    gguf = _open(path)
    from transformers import AutoConfig, AutoTokenizer

    if kept := gguf_cache.find(gguf_cache.key_of(path)):
        return AutoTokenizer.from_pretrained(kept), AutoConfig.from_pretrained(kept)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _header_read_once(gguf):
        return (
            AutoTokenizer.from_pretrained(**where, trust_remote_code=False),
            AutoConfig.from_pretrained(**where, trust_remote_code=False),
        )


def _open(path: Path) -> ModuleType:
    """The gguf package; checks the first bytes of the file."""
    gguf = require("gguf", extra="gguf")
    require("accelerate", extra="gguf")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseLoadError(
                f"{path} is not a GGUF file (it does not begin with 'GGUF'); fetch it again, or give a "
                "model folder"
            )
    return gguf


def _unpack_weights() -> dict[str, Any]:
    """Request plain dense layers; versions of transformers without this option always create them."""
    from transformers.utils import quantization_config

    config = getattr(quantization_config, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _reader_once(gguf: ModuleType) -> Callable[..., Any]:
    """A function that makes one GGUFReader for a file, whose values are slices of a plain array.

    The slices of a memory map that numpy makes for every value of the header take twice as long.
    """

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined, misc]
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._data = np.asarray(mapped)

    once = functools.lru_cache(maxsize=1)(Reader)
    return lambda path, *further: once(os.fspath(path), *further)


@contextmanager
def _header_read_once(gguf: ModuleType) -> Iterator[None]:
    """Context manager: transformers reads the header and the table of names once, without progress bars.

    Reading a header with 50,000 tokens takes 3 s, and transformers reads it three times, under names of
    different types. It rebuilds the table of tensor names for every module of the model.
    """
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as reader

    replaced = [
        (gguf, "GGUFReader", _reader_once(gguf)),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (reader, "tqdm", functools.partial(tqdm, disable=True)),
    ]
    found = [(module, name, getattr(module, name, None)) for module, name, _ in replaced]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in found:
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)
