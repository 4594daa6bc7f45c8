"""The kinds of layers whose weight can be adapted: how to recognise a module, and how it stores W (d×h).

It runs no updates; the package `layers` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.sites.quantised import dequantised, is_packed


@dataclass(frozen=True)
class Kind:
    """One kind of layer, whose weight is W (d×h) in y = x·W.

    Args:
        name: the value of `Site.kind`.
        matches: whether a module is of this kind.
        shape: a module's (d, h), also if its weight is packed.
        to_dxh: the weight as the layer stores it → W, as a view.
        from_dxh: W and the stored shape → the weight as the layer stores it.
        is_plain: whether a class has the standard forward of the kind, y = x·W (+ bias).
        example: a module, a number of rows and a generator → random input for it.
        product: a module, an input x and W (d×k) → x·W.
        in_groups: whether groups of targets, such as all-linear, select it.
        refusal: why a module of this kind cannot be adapted, else None.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    shape: Callable[[Any], tuple[int, int]]
    to_dxh: Callable[[Tensor], Tensor]
    from_dxh: Callable[[Tensor, Sequence[int]], Tensor]
    is_plain: Callable[[type[nn.Module]], bool]
    example: Callable[[Any, int, torch.Generator], Tensor]
    product: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, x, W: x @ W
    in_groups: bool = True
    refusal: Callable[[Any], str | None] = lambda module: None

    @cached_property
    def stores_dxh(self) -> bool:
        """Whether a weight with two axes is stored as W (d×h), not as the transpose (h×d)."""
        return self.to_dxh(torch.empty(1, 2)).shape == (1, 2)


def _is_conv1d(module: nn.Module) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


LINEAR = Kind(
    name="linear",
    matches=lambda module: isinstance(module, nn.Linear),
    shape=lambda module: (module.in_features, module.out_features),
    to_dxh=lambda weight: weight.mT,
    from_dxh=lambda W, shape: W.mT,
    is_plain=lambda cls: cls.forward is nn.Linear.forward,
    example=lambda module, rows, generator: torch.randn(rows, module.in_features, generator=generator),
)
CONV1D = Kind(  # HF's, recognised by its class name, without importing transformers
    name="conv1d",
    matches=_is_conv1d,
    shape=lambda module: tuple(module.weight.shape),
    to_dxh=lambda weight: weight,
    from_dxh=lambda W, shape: W,
    is_plain=lambda cls: cls.__name__ == "Conv1D",
    example=lambda module, rows, generator: torch.randn(rows, module.weight.shape[0], generator=generator),
)

_MAX_NORM = "its max_norm rewrites its weight in the forward pass"


def _look_up(module: Any, x: Tensor, W: Tensor) -> Tensor:
    """The rows of W, with the options of the module: no gradient of padding, and Gemma's scale."""
    rows = F.embedding(x, W, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
    return rows * getattr(module, "embed_scale", 1.0)


EMBEDDING = Kind(
    name="embedding",
    matches=lambda module: isinstance(module, nn.Embedding),
    shape=lambda module: (module.num_embeddings, module.embedding_dim),
    to_dxh=lambda weight: weight,
    from_dxh=lambda W, shape: W,
    is_plain=lambda cls: cls.forward is nn.Embedding.forward,
    example=lambda module, rows, generator: torch.randint(
        module.num_embeddings, (rows,), generator=generator
    ),
    product=_look_up,
    in_groups=False,
    refusal=lambda module: _MAX_NORM if module.max_norm is not None else None,
)

KINDS = {kind.name: kind for kind in (LINEAR, CONV1D, EMBEDDING)}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, or None for one whose weight cannot be adapted."""
    return next((kind for kind in KINDS.values() if kind.matches(module)), None)


def require_kind(module: nn.Module) -> Kind:
    """The kind of a module, which must be a site."""
    kind = kind_of(module)
    assert kind is not None, type(module)
    return kind


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a module runs the standard forward of its kind, not one of its class or instance."""
    kind = kind_of(module)
    return kind is not None and kind.is_plain(type(module)) and "forward" not in module.__dict__


def weight_dxh(module: nn.Module) -> Float[Tensor, "d h"] | None:
    """W (d×h) of a site as a view, or None if it is stored in another form (packed, quantised)."""
    kind, weight = require_kind(module), module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim < 2:
        return None
    W = kind.to_dxh(weight)
    return W if tuple(W.shape) == kind.shape(module) else None


def dense_dxh(module: nn.Module) -> Float[Tensor, "d h"] | None:
    """W (d×h) of a site: a view, or a dequantised copy; None if it is packed in an unknown form."""
    if is_packed(module):
        return require_kind(module).to_dxh(dequantised(module))
    return weight_dxh(module)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a site computes: that of its weight; if it is packed, its own setting, or fp32."""
    weight: Any = module.weight
    if weight.is_floating_point():
        return weight.dtype
    found = getattr(module, "compute_dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def example_input(
    module: nn.Module, rows: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Random input for a site: of this dtype, or integers if its kind takes integers."""
    x = require_kind(module).example(module, rows, generator)
    return x.to(device, dtype if x.is_floating_point() else None)
