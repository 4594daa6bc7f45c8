"""Decides before the first step: fused functions, packed or padded passes, memory mode, size of a pass.

The decisions follow from the model, the config and the machine's features; it does not measure time.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brushstroke.base import (
    context_length,
    hidden_size,
    limit_kernel_caches,
    model_dtype,
    vocabulary_size,
)
from brushstroke.errors import BrushstrokeError, ConfigError
from brushstroke.lowrank.matmul import HALF, choose_kernels, kernels
from brushstroke.packed.compiled import compiled
from brushstroke.packed.forward import Forward
from brushstroke.packed.fused_modules import Fusion, fuse
from brushstroke.packed.memory import (
    MemoryNeed,
    choose_micro_tokens,
    choose_mode,
    kept_per_token,
    need_of,
)
from brushstroke.packed.pack import Row, unshared
from brushstroke.packed.recompute import Checkpointed
from brushstroke.packed.select import select_forward

MIXED_DTYPES = re.compile(r"dtype|scalar type|not implemented for '(Half|BFloat16)'", re.IGNORECASE)


@dataclass(frozen=True)
class Prepared:
    """How the steps of a session run, each choice with its reason in one line.

    Args:
        forward: packed or padded passes.
        fusion: the modules that run fused functions; call its `remove` at the end.
        mode: "fast" or "low" memory.
        need: bytes, by part.
        micro_tokens: computed tokens of one pass.
        kernels: for the matrix products, see `choose_kernels`.
        torch_compile: whether the elementwise functions between the matrix products are compiled.
    """

    forward: Forward
    forward_reason: str
    fusion: Fusion
    mode: str
    mode_reason: str
    need: MemoryNeed
    micro_tokens: int
    micro_reason: str
    kernels: str
    kernels_reason: str
    torch_compile: bool

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context manager that must enclose every forward and backward pass."""
        with self.forward.context(), kernels(self.kernels), compiled(self.torch_compile):
            yield


def prepare(
    model: nn.Module,
    factors: Sequence[Tensor],
    widest: int,
    *,
    share: bool,
    memory: str,
    micro_tokens: int | str,
    checkpointed: Checkpointed | None,
    torch_compile: bool,
) -> Prepared:
    """Decide how steps run on a model with an adapter in it, which is in evaluation mode.

    Args:
        model: the model.
        factors: the trained tensors.
        widest: the largest output width of an adapted site.
        share: whether shared prefixes are computed once.
        memory: "low", "fast" or "auto".
        micro_tokens: computed tokens of one pass, or "auto".
        checkpointed: recomputes the layers' activations; None without gradient checkpointing.
        torch_compile: whether to compile the elementwise functions between the matrix products.

    Raises:
        ConfigError: a value is invalid, or the model cannot run on tokens.
    """
    device = factors[0].device
    if torch_compile and device.type != "cuda":
        raise ConfigError(
            f"torch_compile makes kernels for a GPU, but the model is on {device.type}; leave it out"
        )
    limit_kernel_caches()
    chosen_kernels, kernels_reason = choose_kernels(device, model_dtype(model))
    fusion = fuse(model)
    try:
        try:
            forward, forward_reason, need = _first_pass(model, share, factors, widest, checkpointed)
        except _CannotRun as failure:
            if not fusion.counts:
                raise
            fusion.give_up(failure.message)
            forward, forward_reason, need = _first_pass(model, share, factors, widest, checkpointed)
        mode, mode_reason = choose_mode(need, memory, device)
        if mode == "low":
            fusion.recompute_activations()
            need = _need(model, forward, factors, widest, checkpointed)
        chosen, reason = choose_micro_tokens(need, mode, device)
    except BaseException:
        fusion.remove()
        raise
    if micro_tokens != "auto":
        chosen, reason = int(micro_tokens), "asked for"
    return Prepared(
        forward,
        forward_reason,
        fusion,
        mode,
        mode_reason,
        need,
        chosen,
        reason,
        chosen_kernels,
        kernels_reason,
        torch_compile,
    )


class _CannotRun(ConfigError):
    """The model fails in its first pass; `message` is its error in one line."""

    def __init__(self, model: nn.Module, error: Exception) -> None:
        self.message = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        dtype = model_dtype(model)
        advice = (
            "Training is for models that predict the next token: for others use attach(model, config, "
            "trainable=True) and a loop of your own"
        )
        if dtype in HALF and MIXED_DTYPES.search(self.message):
            advice = "parts of it compute in another dtype; load it with --dtype float32 (dtype='float32')"
        super().__init__(f"{type(model).__name__} cannot be run on tokens ({self.message}); {advice}")


def _first_pass(
    model: nn.Module,
    share: bool,
    factors: Sequence[Tensor],
    widest: int,
    checkpointed: Checkpointed | None,
) -> tuple[Forward, str, MemoryNeed]:
    """How passes run, the reason, and the memory that they need.

    Raises:
        _CannotRun: the model cannot run one pass.
    """
    forward, reason = select_forward(model, share, factors)
    return forward, reason, _need(model, forward, factors, widest, checkpointed)


def _need(
    model: nn.Module,
    forward: Forward,
    factors: Sequence[Tensor],
    widest: int,
    checkpointed: Checkpointed | None,
) -> MemoryNeed:
    def run(tokens: int) -> Tensor:
        row = Row((0,) * tokens, (tokens - 1,), (0,), (1.0,))
        with forward.context():
            return forward.summed_loss(unshared([row]), None)

    try:
        kept = kept_per_token(run, model.parameters(), context_length(model))
    except (BrushstrokeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may raise anything; this is the first pass that must succeed
        raise _CannotRun(model, error) from error
    if checkpointed is not None:  # the inputs of all layers, and all activations of one layer
        hidden = hidden_size(model) or widest
        kept = kept // len(checkpointed) + len(checkpointed) * hidden * model_dtype(model).itemsize
    logits = forward.logits_at_once(vocabulary_size(model) or 0)
    return need_of(model, factors, kept, widest, logits, factors[0].device)
