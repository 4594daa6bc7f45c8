"""Gradient checkpointing of a transformers model that keeps its dropout off.

It does not choose layers: it uses the model's GradientCheckpointingLayers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from brushstroke.errors import ConfigError

_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")


class Checkpointed:
    """Context manager: the model's layers recompute their activations in the backward pass.

    It can be entered several times, but not nested. The checkpointing layers get the training flag that
    they require, but it is off while they compute: they and their submodules run in evaluation mode. At the
    end, all attributes are restored.

    Raises:
        ConfigError: the model has no such layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self._before: list[dict[str, Any]] = []
        if not self._layers:
            raise ConfigError(
                "this model has no layers that can recompute their activations; "
                "train without gradient_checkpointing"
            )

    def __len__(self) -> int:
        """The number of layers that recompute."""
        return len(self._layers)

    def __enter__(self) -> None:
        for layer in self._layers:
            self._before.append({name: layer.__dict__[name] for name in _FLAGS if name in layer.__dict__})
            layer.__dict__.update(zip(_FLAGS, (True, partial(_recomputed, layer), True), strict=True))

    def __exit__(self, *exc: object) -> None:
        for layer, before in zip(self._layers, self._before, strict=True):
            for name in _FLAGS:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(before)
        self._before.clear()


def _recomputed(layer: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """The output of a layer's forward, which the backward pass recomputes."""

    def in_evaluation_mode(*inputs: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return function(*inputs)
        finally:
            layer.training = before

    return checkpoint(in_evaluation_mode, *inputs, use_reentrant=False)
