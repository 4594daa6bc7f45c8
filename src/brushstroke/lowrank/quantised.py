"""Weights in 4 bits as bitsandbytes stores them: how to recognise one, and its values.

The functions take the weight of a layer; `sites.quantised` takes layers, also those in 8 bits.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from brushstroke.errors import BaseLoadError


def is_4bit(weight: object) -> bool:
    """Whether a tensor is a weight of bitsandbytes in 4 bits; does not import bitsandbytes."""
    return type(weight).__name__ == "Params4bit"


def dense_4bit(weight: Any) -> Float[Tensor, "h d"]:
    """The values of a weight in 4 bits as its layer computes with them; a new tensor.

    Raises:
        BaseLoadError: bitsandbytes has repacked it for inference, and rounded its scales.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise BaseLoadError(
            "bitsandbytes has repacked the base's weights for inference in bfloat16, which cannot be undone; "
            "load the model with load_base, which prevents it"
        )
    with torch.no_grad():
        return dequantize_4bit(weight.data, state)
