"""Runs a pass through the model, packed or as a padded batch, up to the logits or the loss of its rows.

It changes no weight and runs no optimiser; `select` decides which of the two forms a model gets.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from brushstroke.base import dynamic_rope_limit, preserved_rope, reset_dynamic_rope
from brushstroke.errors import ConfigError, RouteError
from brushstroke.layers import find_route
from brushstroke.layers.adapted import Adapted
from brushstroke.packed.attention import AttentionName, UnsupportedAttention
from brushstroke.packed.cross_entropy import (
    LossFunction,
    chunked_cross_entropy,
    summed_loss,
    vocab_chunk_size,
)
from brushstroke.packed.layout import Layout, build_layout, build_prefix_layout
from brushstroke.packed.memory import CPU_MICRO_TOKENS
from brushstroke.packed.pack import Group, Pass, Row, plan_passes, unshared
from brushstroke.packed.prefix_cache import PrefixCache
from brushstroke.packed.probes import probe_rows

_AT_ONCE = 128  # positions whose logits exist at the same time in `target_losses`


class Forward(Protocol):
    """Plans passes from rows and computes the outputs of each pass."""

    name: str
    device: torch.device

    def passes(self, rows: Sequence[Row], micro_tokens: int, share: bool) -> list[Pass]:
        """Arrange rows over passes."""
        ...

    def context(self) -> AbstractContextManager[None]:
        """Context manager that must enclose forward and backward passes."""
        ...

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, "Outputs"]]:
        """Each pass of a step with its outputs; run its backward pass before you take the next one."""
        ...

    def summed_loss(self, packed: Pass, loss: LossFunction | None) -> Tensor:
        """Σ weight·nll of a pass's targets, with its autograd graph."""
        ...

    def logits(self, packed: Pass) -> Tensor:
        """The logits (m×v) of a pass's wanted positions, row by row."""
        ...

    def logits_at_once(self, vocabulary: int) -> int:
        """The largest number of logits that exist at one time."""
        ...


@dataclass(frozen=True)
class Head:
    """The head of a model, which maps the decoder's last hidden states to logits.

    Args:
        decoder: the model without its head, or None if only the whole model can be run.
        layer: the head.
        chunked: whether the head is a plain frozen matrix, so that the chunked loss can be used.
    """

    decoder: nn.Module | None = None
    layer: nn.Module | None = None
    chunked: bool = False

    def logits_at_once(self, vocabulary: int) -> int:
        """Those of one chunk; without the chunked loss, those of a full pass with softmax and gradient."""
        layer: Any = self.layer
        if not self.chunked:
            return 3 * CPU_MICRO_TOKENS * vocabulary
        return CPU_MICRO_TOKENS * min(vocabulary, vocab_chunk_size(CPU_MICRO_TOKENS, layer.weight.device))


@dataclass(frozen=True)
class Outputs:
    """The values of a pass at its wanted positions: hidden states if there is a head, else logits."""

    values: Tensor
    targets: Tensor
    weights: Tensor
    head: Head | None

    def logits(self) -> Tensor:
        """The logits (m×v)."""
        return self.head.layer(self.values) if self.head and self.head.layer else self.values

    def target_losses(self) -> Tensor:
        """−log p of each target (m), in at least fp32; without gradients."""
        losses = []
        with torch.no_grad():  # in parts, because the logits of all positions need much memory
            for values, targets in zip(
                self.values.split(_AT_ONCE), self.targets.split(_AT_ONCE), strict=True
            ):
                logits = Outputs(values, targets, targets, self.head).logits()
                wide = torch.promote_types(logits.dtype, torch.float32)
                losses.append(F.cross_entropy(logits.to(wide), targets, reduction="none"))
        return torch.cat(losses)

    def summed_loss(self, loss: LossFunction | None) -> Tensor:
        """Σ weight·nll, in chunks if the head is a plain frozen matrix."""
        if loss is None and self.head and self.head.chunked:
            layer: Any = self.head.layer
            return chunked_cross_entropy(self.values, layer.weight, layer.bias, self.targets, self.weights)
        return summed_loss(self.logits(), self.targets, self.weights, loss)


class _Headed(ABC):
    """Base class of packed and padded passes: computes loss and logits from the outputs of `_run`."""

    _model: nn.Module
    _head: Head
    _moving: int | None  # rows with more tokens than this change the rotary frequencies of their whole pass
    _ends: Callable[[Row], int]  # the number of a row's tokens that run

    @abstractmethod
    def _run(self, packed: Pass) -> Outputs: ...

    @abstractmethod
    def _arrange(self, rows: Sequence[Row], micro_tokens: int, share: bool) -> list[Pass]: ...

    def passes(self, rows: Sequence[Row], micro_tokens: int, share: bool) -> list[Pass]:
        """Arrange rows over passes; rows that change the rotary frequencies of others run alone."""
        if self._moving is None:
            return self._arrange(rows, micro_tokens, share)
        far = [row for row in rows if self._ends(row) > self._moving]
        near = [row for row in rows if self._ends(row) <= self._moving]
        arranged = self._arrange(near, micro_tokens, share) if near else []
        return [*arranged, *(unshared([row]) for row in far)]

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context manager: restore dynamic rotary frequencies and the active route at the end."""
        route = find_route(self._model)
        with preserved_rope(self._model), nullcontext() if route is None else route.kept():
            yield

    def _use(self, slots: Sequence[int], lengths: Sequence[int] | None, wanted: Sequence[int]) -> None:
        """Switch to the slots of a pass, until the next pass or the end of the context; see `Route.set`.

        Raises:
            RouteError: the model has no bank.
        """
        route = find_route(self._model) if slots else None
        if route is not None:
            route.set(slots, lengths, wanted)
        elif any(slots):
            raise RouteError(
                "rows name slots of a bank, but the model has no bank; make one with bank(model, ...)"
            )

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, Outputs]]:
        """Each pass with the values at its wanted positions."""
        for packed in passes:
            yield packed, self._run(packed)

    def summed_loss(self, packed: Pass, loss: LossFunction | None) -> Tensor:
        """Σ weight·nll of the pass."""
        return self._run(packed).summed_loss(loss)

    def logits(self, packed: Pass) -> Tensor:
        """The logits (m×v) of the pass's wanted positions, row by row."""
        return self._run(packed).logits()

    def logits_at_once(self, vocabulary: int) -> int:
        """The largest number of logits that exist at one time."""
        return self._head.logits_at_once(vocabulary)


class PackedForward(_Headed):
    """Runs all rows of a pass as one row without padding; positions restart, shared prefixes occur once."""

    name = "packed"

    def __init__(self, model: nn.Module, head: Head) -> None:
        self._model = model
        self._head = head
        self._moving, self._ends = dynamic_rope_limit(model), attrgetter("input_length")
        self._attention = AttentionName(model)
        self.windows: set[int | None] = set()  # the sliding windows that attention calls used so far
        if chunked := self._attention.chunked:
            raise UnsupportedAttention(f"its attention works in chunks of {chunked} tokens")
        self.device = next(model.parameters()).device
        self.reuses_prefix = False  # whether a prefix may run once for several passes

    def _arrange(self, rows: Sequence[Row], micro_tokens: int, share: bool) -> list[Pass]:
        return plan_passes(rows, micro_tokens, share, self.reuses_prefix)

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[Pass, Outputs]]:
        """Each pass with its outputs; a shared prefix runs before its passes, and its backward after them."""
        cache: PrefixCache | None = None
        for packed in passes:
            group = packed.groups[0]
            if group.part in (None, 0):  # no later pass uses the previous prefix
                if cache is not None:
                    cache.finish()
                cache = self._cache_prefix(group) if group.part == 0 else None
            yield packed, self._run(packed, cache)
        if cache is not None:
            cache.finish()

    def _cache_prefix(self, group: Group) -> PrefixCache:
        """Run a group's prefix and keep its keys and values."""
        cache = PrefixCache()
        self._outputs(build_prefix_layout(group, self.device, cache))
        cache.close()
        return cache

    @property
    def lost_window(self) -> int | None:
        """The sliding window that the model's config declares but none of its attention calls uses."""
        return self._attention.window if self.windows <= {None} else None

    @contextmanager
    def context(self) -> Iterator[None]:
        """Context manager: also packed attention, including recomputation by gradient checkpointing."""
        with super().context(), self._attention.packed():
            yield

    def _run(self, packed: Pass, cache: PrefixCache | None = None) -> Outputs:
        return self._outputs(build_layout(packed, self.device, cache))

    def _outputs(self, layout: Layout) -> Outputs:
        if self._moving is not None:
            reset_dynamic_rope(self._model)
        self._use(layout.slots, layout.lengths, layout.wanted)
        inputs: dict[str, Any] = {
            "input_ids": layout.tokens,
            "position_ids": layout.positions,
            "attention_mask": None,
            "use_cache": False,
            "brushstroke_layout": layout,
        }
        self.windows = layout.windows
        if self._head.decoder is not None:
            hidden = self._head.decoder(**inputs)[0][0]
            return Outputs(hidden[layout.sources], layout.targets, layout.weights, self._head)
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            logits = _logits(self._model(**inputs, logits_to_keep=layout.sources))[0]
        else:
            logits = _logits(self._model(**inputs))[0][layout.sources]
        return Outputs(logits, layout.targets, layout.weights, None)


class PaddedForward(_Headed):
    """Right-padded batches, for models that give wrong results with packing.

    Args:
        model: the model.
        head: the head of the model.
        whole: also run the tokens after a row's last wanted position, for models that look ahead.
    """

    name = "padded"

    def __init__(self, model: nn.Module, head: Head, whole: bool) -> None:
        self._model = model
        self._moving, self._ends = dynamic_rope_limit(model), len if whole else attrgetter("input_length")
        self._head = head
        self.device = next(model.parameters()).device
        runner = head.decoder or model
        self._accepts = _accepted(runner)

    def _arrange(self, rows: Sequence[Row], micro_tokens: int, share: bool) -> list[Pass]:
        """Batches of rows of similar length, of at most `micro_tokens` tokens with padding."""
        passes: list[Pass] = []
        batch: list[Row] = []
        for row in sorted(rows, key=self._ends):
            if batch and (len(batch) + 1) * self._ends(row) > micro_tokens:
                passes.append(unshared(batch))
                batch = []
            batch.append(row)
        return [*passes, unshared(batch)] if batch else passes

    def _run(self, packed: Pass) -> Outputs:
        if self._moving is not None:
            reset_dynamic_rope(self._model)
        rows = packed.rows
        slotted = [(row.slot, len(row.wanted)) for row in rows if row.slot is not None]
        self._use([slot for slot, _ in slotted], None, [wanted for _, wanted in slotted])
        tokens = torch.zeros(len(rows), max(map(self._ends, rows)), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, row in enumerate(rows):
            end = self._ends(row)
            tokens[i, :end], mask[i, :end] = torch.tensor(row.tokens[:end]), 1
        wanted = [(i, position) for i, row in enumerate(rows) for position in row.wanted]
        terms = [term for row in rows for term in zip(*row.loss_terms, strict=True)]
        row, column = torch.tensor(wanted, dtype=torch.long).view(-1, 2).to(self.device).unbind(1)
        targets = torch.tensor([target for target, _ in terms], dtype=torch.long, device=self.device)
        kept = torch.tensor([weight for _, weight in terms], dtype=torch.float32, device=self.device)
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if "attention_mask" in self._accepts:
            inputs["attention_mask"] = mask
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        if self._head.decoder is not None:
            hidden = self._head.decoder(**inputs)[0]
            return Outputs(hidden[row, column], targets, kept, self._head)
        return Outputs(_logits(self._model(**inputs))[row, column], targets, kept, None)


def find_head(model: nn.Module) -> Head:
    """Decoder and head if running them separately gives the model's logits; else an empty `Head`."""
    prefix = getattr(model, "base_model_prefix", "")
    decoder = getattr(model, prefix, None) if prefix else None
    getter = getattr(model, "get_output_embeddings", None)
    try:
        layer = getter() if callable(getter) else None
        if not isinstance(decoder, nn.Module) or not isinstance(layer, nn.Linear) or decoder is model:
            return Head()
        device = next(model.parameters()).device
        tokens = torch.tensor([probe_rows(model)[0].tokens], device=device)
        with torch.no_grad():
            whole = _logits(model(input_ids=tokens, use_cache=False)).double()
            by_hand = layer(decoder(input_ids=tokens, use_cache=False)[0]).double()
        same = whole.shape == by_hand.shape and float((whole - by_hand).norm() / whole.norm()) < 1e-5
    except Exception:  # a model may raise anything here: run it whole
        return Head()
    if not same:
        return Head()
    plain = (
        not isinstance(layer, Adapted)
        and type(layer).forward is nn.Linear.forward
        and not layer.weight.requires_grad
    )
    return Head(decoder, layer, plain)


def _logits(output: Any) -> Float[Tensor, "b n v"]:
    """The logits in the value that a model returns.

    Raises:
        ConfigError: it contains no logits for each token.
    """
    logits = output
    if hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, tuple | list):
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        found = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
        raise ConfigError(
            f"the model returns no logits for each token (it returns {found}); load a model with a "
            "language-model head, for example with AutoModelForCausalLM"
        )
    return logits


def _accepted(module: nn.Module) -> set[str]:
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {"attention_mask", "use_cache", *parameters}
    return set(parameters)
