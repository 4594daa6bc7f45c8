"""The options with which transformers loads a model in 4 or 8 bits.

How a quantised layer computes is in bitsandbytes; how its weight is read is in `sites.quantised`.
"""

import logging
from typing import Any

import torch

from brushstroke.checks import check_choice
from brushstroke.errors import ConfigError, require

METHODS = ("nf4",)
EXTRA = "quant"


def quantisation(method: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantise a model while it is loaded.

    Args:
        method: "nf4".
        dtype: in which the quantised layers compute.
        device: of the model.

    Raises:
        ConfigError: an unknown method, or a device for which it does not exist.
        MissingPackageError: bitsandbytes or accelerate is not installed.
    """
    check_choice("quantize", method, METHODS)
    if device.type == "mps":
        raise ConfigError(f"{method} needs bitsandbytes, which does not support {device.type}; use the CPU")
    require("bitsandbytes", extra=EXTRA)
    require("accelerate", extra=EXTRA)
    from transformers import BitsAndBytesConfig

    made = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": made, "device_map": {"": device}}


def use_stored(
    name: str, config: Any, dtype: torch.dtype, device: torch.device, asked: str | None
) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a folder with quantised weights; none for plain ones.

    Args:
        name: of the base.
        config: of the model; layers in 4 bits will compute in `dtype`, whatever it says.
        dtype: of the model.
        device: of the model.
        asked: the method that the user gave.

    Raises:
        ConfigError: a method was given for a model that is quantised already.
        MissingPackageError: bitsandbytes or accelerate is not installed.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {}
    if asked is not None:
        raise ConfigError(f"the weights in {name} are quantised already; leave quantize (--quantize) out")
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    if str(settings.get("quant_method")).lower().rpartition(".")[2] not in ("bitsandbytes", "bits_and_bytes"):
        return {}  # transformers knows others, and dequantises some of them
    require("bitsandbytes", extra=EXTRA)
    require("accelerate", extra=EXTRA)
    computes_in = str(dtype).removeprefix("torch.")
    # in 8 bits, it would warn in every product of inputs that are not float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config.quantization_config = {**settings, "bnb_4bit_compute_dtype": computes_in}
    return {"device_map": {"": device}}


def unify_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights that are not quantised; transformers keeps their stored dtype.

    Args:
        model: from a folder with quantised weights.
        dtype: of the other weights, except those that the model's class keeps in fp32.
    """
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    for path, module in model.named_modules():
        if not any(name in path.split(".") for name in wide):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)


def forget_quantisation(model: torch.nn.Module) -> None:
    """Remove the flags of a quantised model: its weights are dense now, and save_pretrained must work."""
    model.__dict__.pop("hf_quantizer", None)
    for flag in ("is_quantized", "quantization_method"):
        model.__dict__.pop(flag, None)
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if (conversions := model.__dict__.get("_weight_conversions")) is not None:  # undone by save_pretrained
        model.__dict__["_weight_conversions"] = [one for one in conversions if not _quantises(one)]


def _quantises(conversion: Any) -> bool:
    return any(
        "bitsandbytes" in type(operation).__module__ for operation in getattr(conversion, "operations", ())
    )
