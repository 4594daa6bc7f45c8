"""Loading a GGUF file through transformers: silent, with its header read once, and as a plain model.

It knows nothing of the format itself; transformers and the gguf package do.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from brushstroke.errors import BaseLoadError, require


def load_gguf(path: Path, **options: Any) -> tuple[nn.Module, dict[str, Any], Any]:
    """The model of a GGUF file, dequantised, with transformers' loading report and the file's tokenizer.

    Raises:
        BaseLoadError: the file is no GGUF file.
        MissingPackageError: the gguf extra is not installed.
    """
    gguf = _open(path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _header_read_once(gguf):
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**where, **_unpack_weights(), **options)
    model, report = loaded
    _forget_quantisation(model)
    return model, report, tokenizer


def load_gguf_tokenizer(path: Path) -> tuple[Any, Any]:
    """The tokenizer and the config of a GGUF file, without its weights.

    Raises:
        BaseLoadError: the file is no GGUF file.
        MissingPackageError: the gguf extra is not installed.
    """
    gguf = _open(path)
    from transformers import AutoConfig, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _header_read_once(gguf):
        return (
            AutoTokenizer.from_pretrained(**where, trust_remote_code=False),
            AutoConfig.from_pretrained(**where, trust_remote_code=False),
        )


def _open(path: Path) -> ModuleType:
    """The gguf package, after a look at the file's first bytes."""
    gguf = require("gguf", extra="gguf")
    require("accelerate", extra="gguf")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BaseLoadError(
                f"{path} is not a GGUF file (it does not begin with 'GGUF'); fetch it again, or give a model "
                f"folder"
            )
    return gguf


def _unpack_weights() -> dict[str, Any]:
    """Ask for plain dense layers; versions of transformers without this switch make nothing else."""
    from transformers.utils import quantization_config

    config = getattr(quantization_config, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _forget_quantisation(model: nn.Module) -> None:
    """Take back the flags of a packed model: its weights are plain now, and save_pretrained must work."""
    model.__dict__.pop("hf_quantizer", None)
    for flag in ("is_quantized", "quantization_method"):
        model.__dict__.pop(flag, None)
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config


@contextmanager
def _header_read_once(gguf: ModuleType) -> Iterator[None]:
    """Within it, transformers reads one file's header and table of names once, and draws no bars.

    Reading a header of 50,000 words takes 3 s and transformers does it three times; the table of tensor names
    it builds anew for every module of the model.
    """
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as reader

    replaced = [
        (gguf, "GGUFReader", functools.lru_cache(maxsize=1)(gguf.GGUFReader)),
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
