"""Linear layers of bitsandbytes, which store W in 4 or 8 bits: how to recognise them, and W as a matrix.

It imports bitsandbytes only for a layer that has such a weight.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_PACKED = {"Params4bit", "Int8Params"}  # classes of bitsandbytes, recognised without importing it


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a module is quantised by bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in _PACKED


def dequantised(module: nn.Module) -> Float[Tensor, "h d"]:
    """The weight of such a module as its forward uses it, in the dtype in which that is computed; a copy."""
    from bitsandbytes import functional

    weight: Any = module.weight
    with torch.no_grad():
        if type(weight).__name__ == "Params4bit":
            return functional.dequantize_4bit(weight.data, weight.quant_state)
        state: Any = module.state
        codes, scales = (weight.CB, weight.SCB) if weight.SCB is not None else (state.CB, state.SCB)
        return functional.int8_vectorwise_dequant(codes, scales)


def plain_linear(module: Any, weight: Float[Tensor, "h d"]) -> nn.Linear:
    """A dense layer with this weight and the bias of a module."""
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(weight.dtype).clone(), requires_grad=False)
    made.training = module.training
    return made
