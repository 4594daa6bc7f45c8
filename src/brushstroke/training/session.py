"""`Training`: the operations of a training run, for custom training loops.

It contains no loop (see `loop`) and no file format (see `checkpoint`).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base, check_max_length, context_length, hidden_size
from brushstroke.data import ChatFormat, EncodedData, Example, Template, encode, find_template
from brushstroke.errors import DataError, NonFiniteError, TrainingError
from brushstroke.inference import generate
from brushstroke.layers import FullFineTuning, TrainableAttachment, attach, attach_full
from brushstroke.packed import LossFunction, Prepared, prepare
from brushstroke.packed.pack import Pass, Row
from brushstroke.packed.recompute import Checkpointed
from brushstroke.philox import dropout_seed
from brushstroke.sites.targets import short_names
from brushstroke.training.check import (
    check_lengths,
    check_loss,
    check_model,
    check_vocabulary,
)
from brushstroke.training.checkpoint import load_session, save_session
from brushstroke.training.config import LORA_OVER_FULL, StepConfig, default_learning_rate

NAMED_TARGETS = 12  # maximum number of targets in an error message
EVALUATED_AT_ONCE = 64  # examples per group in which shared prefixes are found


@dataclass(frozen=True)
class StepResult:
    """The result of one `forward_backward` call.

    Args:
        loss: per trained token, in nats.
        trained_tokens: tokens whose prediction is in the loss.
        real_tokens: tokens of the examples, without padding.
        computed_tokens: tokens that ran through the layers; a shared prefix counts once, and
            tokens after the last target do not count.
    """

    loss: float
    trained_tokens: int
    real_tokens: int
    computed_tokens: int


class Training:
    """A base with a trainable adapter, or with trainable weights; a context manager that detaches on exit.

    Several `forward_backward` calls before one `optim_step` equal one call with all the examples: gradients
    add up, and the step divides them by the trained tokens of all calls.

    Args:
        base: the frozen model: a Base, or an nn.Module for tokenised examples.
        start: the config of a new adapter, an existing adapter, or the sites whose W is trained directly.
        config: the settings of a step.
        dropout: on the low-rank path; by default that of the LoraConfig.
        chat_template: for examples and prompts, instead of that of the config, the adapter or the tokenizer:
            a template, a file, the name of a template, or a chat format.
        allow_different_base: accept a start adapter that belongs to another base.
        settings: fields of `StepConfig` that replace those of `config`, such as `learning_rate=1e-3`.

    Gradients are enabled inside, independent of the caller's mode. Until `close`, norms, rotary embeddings
    and MLPs run as fused functions: their outputs equal the base's up to rounding (`attach` alone keeps every
    bit).

    Raises:
        TargetError, AttachError, BaseMismatchError: as `attach`.
        ConfigError: an invalid value, or a model that is not a causal language model.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        base: Any,
        start: LoraConfig | Adapter | FullFineTuning | None = None,
        config: StepConfig | None = None,
        *,
        dropout: float | None = None,
        chat_template: Template | ChatFormat = None,
        allow_different_base: bool = False,
        **settings: Any,
    ) -> None:
        self.config = replace(config or StepConfig(), **settings)
        self.base = base if isinstance(base, Base) else Base(base)
        self.model = self.base.model
        check_model(self.model)
        check_max_length(self.model, self.config.max_length)
        self.context = context_length(self.model)  # computed once, because it visits every module
        self.attachment = self._attach(start, dropout, allow_different_base)
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._prepared: Prepared | None = None
        self._closed = False
        try:
            self._prepare()
            rule = default_learning_rate(hidden_size(self.model))
            if isinstance(start, FullFineTuning):
                rule /= LORA_OVER_FULL
            self.learning_rate = self.config.learning_rate or rule
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters, self.learning_rate, weight_decay=self.config.weight_decay, fused=True
            )
        except BaseException:
            self.close()
            raise
        self._chat_template = chat_template or self.config.chat_template
        self.steps = 0
        self._micro_calls = 0
        self._pending_tokens = 0
        self._ran: set[object] = set()  # adapted modules that ran since the last step

    def _attach(
        self, start: LoraConfig | Adapter | FullFineTuning | None, dropout: float | None, different_base: bool
    ) -> TrainableAttachment:
        if isinstance(start, FullFineTuning):
            return attach_full(self.base, start)
        return attach(
            self.base,
            LoraConfig() if start is None else start,
            trainable=True,
            seed=self.config.seed,
            dropout=dropout,
            allow_different_base=different_base,
        )

    def _prepare(self) -> None:
        config = self.config
        self.model.eval()
        self.attachment.train()
        self.parameters = list(self.attachment.parameters())
        self.device = self.parameters[0].device
        self.has_dropout = self.attachment.has_dropout
        self.share_prefixes = not self.has_dropout if config.share_prefixes is None else config.share_prefixes
        checkpointed = Checkpointed(self.model) if config.gradient_checkpointing else None
        self._checkpointing = checkpointed or nullcontext()
        with _no_dropout(self.attachment):
            self._prepared = prepare(
                self.model,
                self.parameters,
                self.attachment.widest,
                share=self.share_prefixes,
                memory=config.memory,
                micro_tokens=config.micro_tokens,
                checkpointed=checkpointed,
                torch_compile=config.torch_compile,
            )
        self.micro_tokens = self._prepared.micro_tokens

    @property
    def step(self) -> Prepared:
        """The decisions about the steps, with reasons."""
        assert self._prepared is not None
        return self._prepared

    @property
    def packed(self) -> bool:
        """Whether packed passes are used; if not, padded batches are, and `step.forward_reason` says why."""
        return self.step.forward.name == "packed"

    @torch.inference_mode(False)
    def forward_backward(self, examples: Any, loss: LossFunction | None = None) -> StepResult:
        """Add the gradients of these examples to the pending gradients (gradient accumulation).

        Args:
            examples: tokenised examples, or anything that `train` accepts as data.
            loss: replaces cross-entropy: (logits of the trained positions (m×v, fp32 or wider), targets (m),
                weights (m): those of the examples divided by m) → scalar, averaged over the positions.

        Raises:
            NonFiniteError: the loss is non-finite. Any error discards all pending gradients.
            DataError: the examples cannot be trained on.
            ConfigError: `loss` has another signature, or returns no scalar that depends on the logits.
        """
        self._check_open()
        if loss is not None:
            check_loss(loss)
        encoded = self.encode(examples)
        if not encoded:
            raise DataError("no examples given; pass at least one")
        total = torch.zeros((), dtype=torch.float64)
        computed = 0
        trained = sum(example.trained for example in encoded)
        with (
            self._all_or_nothing(),
            self._checkpointing,
            self.step.context(),
            self._dropout_seed(),
            self.attachment.recorded() as ran,
        ):
            for part, outputs in self.step.forward.run(self.passes(encoded)):
                value = outputs.summed_loss(loss)
                if not bool(torch.isfinite(value)):
                    suspect = "the base's weights" if loss is None else "`loss` or the base's weights"
                    cause = "" if self.steps else f" (nothing is trained yet: {suspect} may be the cause)"
                    raise NonFiniteError(
                        f"the loss is {value.item()} in step {self.steps + 1}; lower the learning rate "
                        f"(it is {self.learning_rate:g}), use float32, or look for broken rows in the "
                        f"data{cause}"
                    )
                value.backward()
                total += value.detach().item()
                computed += part.computed_tokens
        self._ran |= ran
        self._pending_tokens += trained
        self._micro_calls += 1
        real = sum(len(example) for example in encoded)
        return StepResult(float(total) / max(1, trained), trained, real, computed)

    def passes(self, examples: Sequence[Example]) -> list[Pass]:
        """The passes into which the examples of one step are split."""
        rows = [Row.of(example) for example in examples]
        return self.step.forward.passes(rows, self.micro_tokens, self.share_prefixes)

    def optim_step(self, learning_rate: float | None = None) -> float:
        """One AdamW step with the pending gradients; returns their norm before clipping.

        Raises:
            TrainingError: no gradients are pending, or a site ran but got none; the factors do not change.
            NonFiniteError: a gradient is non-finite; the factors do not change.
        """
        self._check_open()
        if not self._pending_tokens:
            raise TrainingError(
                "no gradients are pending; call forward_backward() first, with examples that have a trained "
                "token"
            )
        self._refuse_unreached()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._pending_tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        if not bool(torch.isfinite(norm)):
            self.zero_grad()
            raise NonFiniteError(
                f"a gradient is non-finite in step {self.steps + 1}; lower the learning rate "
                f"(it is {self.learning_rate:g}) or use float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate if learning_rate is None else learning_rate
        self.optimizer.step()
        self.zero_grad()
        self.steps += 1
        return float(norm)

    @torch.inference_mode(False)
    @torch.no_grad()
    def loss(self, examples: Any) -> StepResult:
        """The loss per trained token of these examples, without gradients and without dropout."""
        self._check_open()
        encoded = self.encode(examples)
        total, computed = 0.0, 0
        with _no_dropout(self.attachment), self.step.context():
            for start in range(0, len(encoded), EVALUATED_AT_ONCE):
                chunk = encoded[start : start + EVALUATED_AT_ONCE]
                for part, outputs in self.step.forward.run(self.passes(chunk)):
                    total += outputs.summed_loss(None).item()
                    computed += part.computed_tokens
        trained = sum(example.trained for example in encoded)
        return StepResult(total / max(1, trained), trained, sum(len(e) for e in encoded), computed)

    def sample(self, prompts: Any, **options: Any) -> list[str]:
        """Answers of the model in its current state; takes the options of `generate`."""
        self._check_open()
        with _no_dropout(self.attachment):
            options.setdefault("chat_template", self.chat.template if self.chat else None)
            return [answer.text for answer in generate(self.base, prompts, **options)]

    @cached_property
    def chat(self) -> ChatFormat | None:
        """The chat format of conversations; None without a tokenizer."""
        given, card = self._chat_template, self.attachment.card
        if self.base.tokenizer is None or isinstance(given, ChatFormat):
            return given if isinstance(given, ChatFormat) else None
        return ChatFormat(self.base.tokenizer, find_template(given) or (card.chat_template if card else None))

    def adapter(self) -> Adapter:
        """A copy of the current adapter, with the chat template and the stop tokens in its card."""
        card, chat = self.attachment.card, self.chat
        if card is not None and chat is not None:
            stops = tuple(dict.fromkeys((*card.stop_tokens, *chat.stop_texts)))
            card = card.with_changes(chat_template=chat.template, stop_tokens=stops, task="CAUSAL_LM")
        return self.attachment.adapter(card)

    def save(self, folder: str | Path) -> None:
        """Write factors, optimiser state and counters; after `load`, training continues bit for bit.

        Raises:
            TrainingError: gradients are pending, which a checkpoint does not store.
        """
        self._check_open()
        if self._pending_tokens:
            raise TrainingError(
                "gradients are pending and are not stored in checkpoints; call optim_step() or zero_grad() "
                "first"
            )
        save_session(self, Path(folder))

    def load(self, folder: str | Path) -> "Training":
        """Load the state of a checkpoint that `save` wrote for the same base and sites.

        Pending gradients are discarded: they belong to the earlier state.

        Raises:
            ResumeError: it belongs to another adapter, or is damaged.
        """
        self._check_open()
        load_session(self, Path(folder))
        self.zero_grad()
        return self

    def close(self) -> None:
        """Detach the adapter, if it is still attached; then the base is bit for bit the same as before."""
        if self._closed:
            return
        self._closed = True
        if self._prepared is not None:
            self._prepared.fusion.remove()
        for module, mode in self._modes:
            module.training = mode
        if self.attachment.attached:
            self.attachment.detach()

    def encode(self, examples: Any) -> Sequence[Example]:
        """Tokenised examples from any data that `train` accepts."""
        if isinstance(examples, Example):
            examples = [examples]
        if isinstance(examples, Iterable) and not isinstance(examples, str | dict):
            is_encoded = isinstance(examples, EncodedData)
            examples = examples if is_encoded else list(examples)
            if is_encoded or all(isinstance(example, Example) for example in examples):
                check_vocabulary(examples, self.model)
                check_lengths(examples, self.context, self.config.max_length)
                return examples
        limit = self.config.max_length or self.context
        encoded = encode(examples, self.base.tokenizer, max_length=limit, chat_template=self.chat)
        check_vocabulary(encoded, self.model)
        return encoded

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def zero_grad(self) -> None:
        """Discard the pending gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self._pending_tokens = 0
        self._micro_calls = 0
        self._ran.clear()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Context manager: on an error, discard the pending gradients."""
        try:
            yield
        except BaseException:
            self.zero_grad()
            raise

    def ran(self) -> list[str]:
        """The sites that ran since the last `optim_step`."""
        return [path for path, module in self.attachment.modules.items() if module in self._ran]

    def unreached(self) -> list[str]:
        """The sites that ran since the last `optim_step` but got no gradient."""
        named = self.attachment.named_parameters()
        without = {name.rpartition(".")[0] for name, parameter in named if parameter.grad is None}
        return [path for path in self.ran() if path in without]

    def _refuse_unreached(self) -> None:
        """Check that every site that ran since the last step got a gradient.

        Raises:
            TrainingError: it names the sites without a gradient; the pending gradients are discarded.
        """
        lost = self.unreached()
        if lost:
            self.zero_grad()
            more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
            rest = [path for path in self.attachment.sites if path not in lost]
            names = short_names(rest, [path for path, _ in self.model.named_modules()])
            flags = f" (--targets {','.join(names)})" if 0 < len(names) <= NAMED_TARGETS else ""
            raise TrainingError(
                f"{len(lost)} of {len(self.attachment.sites)} sites ran in step {self.steps + 1} but got no "
                f"gradient: {', '.join(lost[:4])}{more}; the model detaches their output, or does not use it "
                f"for its predictions: leave them out of the targets{flags}"
            )

    def _check_open(self) -> None:
        if self._closed or not self.attachment.attached:
            raise TrainingError(
                "this training was closed; create a new one (start it from the old adapter to continue)"
            )

    def _dropout_seed(self) -> AbstractContextManager[None]:
        """Seed dropout from (seed, step, call): a resumed run draws the values of an uninterrupted one."""
        if not self.has_dropout:
            return nullcontext()
        return _seeded(dropout_seed(self.config.seed, self.steps, self._micro_calls))


@contextmanager
def _no_dropout(attachment: TrainableAttachment) -> Iterator[None]:
    """Context manager: switch off the dropout of the low-rank path."""
    attachment.train(False)
    try:
        yield
    finally:
        attachment.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context manager: seed torch's generators with `seed`; restore their state on exit."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
