"""Linear layers of bitsandbytes, which store W in 4 or 8 bits: how to recognise them, and W as a matrix.

It imports bitsandbytes only for a layer that has such a weight.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.lowrank.quantised import dense_4bit, is_4bit

_PACKED = {"Params4bit", "Int8Params"}  # classes of bitsandbytes, recognised without importing it


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a module is quantised by bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in _PACKED


def dequantised(module: nn.Module) -> Float[Tensor, "h d"]:
    """The weight of such a module as its forward uses it, in the dtype in which that is computed; a copy."""
    weight: Any = module.weight
    if is_4bit(weight):
        return dense_4bit(weight)
    from bitsandbytes.functional import int8_vectorwise_dequant

    state: Any = module.state
    codes, scales = (weight.CB, weight.SCB) if weight.SCB is not None else (state.CB, state.SCB)
    with torch.no_grad():
        return int8_vectorwise_dequant(codes, scales)


def is_product(module: Any, dtype: torch.dtype) -> bool:
    """Whether a layer in 4 bits computes x·W + bias in the dtype of its input."""
    return is_4bit(module.weight) and module.compute_dtype in (None, dtype)


def keep_packing(model: nn.Module) -> None:
    """Forbid that layers in 4 bits repack their weights on processors that multiply bf16.

    bitsandbytes does so in the first forward pass that needs no gradient: it rounds the scales to bf16, and
    the layer then passes no gradient to its input.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def plain_linear(module: Any, weight: Float[Tensor, "h d"]) -> nn.Linear:
    """A dense layer with this weight and the bias of a module."""
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(weight.dtype).clone(), requires_grad=False)
    made.training = module.training
    return made
