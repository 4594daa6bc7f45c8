"""`Training`: the verbs of a training run, for loops of one's own.

The loop itself is in `loop`; files are in `checkpoint`.
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
from brushstroke.data import ChatFormat, Example, Template, encode, find_template
from brushstroke.errors import DataError, NonFiniteError, TrainingError
from brushstroke.inference import generate
from brushstroke.layers import FullFineTuning, TrainableAttachment, attach, attach_full
from brushstroke.packed import LossFunction, Prepared, prepare
from brushstroke.packed.pack import Pass, Row
from brushstroke.packed.recompute import Checkpointed
from brushstroke.sites.targets import short_names
from brushstroke.training.check import (
    check_lengths,
    check_loss,
    check_model,
    check_vocabulary,
)
from brushstroke.training.checkpoint import load_session, save_session
from brushstroke.training.config import LORA_OVER_FULL, StepConfig, default_learning_rate
from brushstroke.training.philox import dropout_seed

NAMED_TARGETS = 12  # at most, in an error
EVALUATED_AT_ONCE = 64  # examples whose shared prefixes are looked for together


@dataclass(frozen=True)
class StepResult:
    """What one `forward_backward` did.

    Args:
        loss: per trained token, in nats.
        trained_tokens: tokens whose prediction is in the loss.
        real_tokens: tokens of the examples, without padding.
        computed_tokens: tokens that ran through the layers: prefixes once, nothing after a last target.
    """

    loss: float
    trained_tokens: int
    real_tokens: int
    computed_tokens: int


class Training:
    """A base in which an adapter, or some weights themselves, are trained; a context manager that detaches.

    Several `forward_backward` calls before one `optim_step` equal one call with all the examples: gradients
    add up, and the step divides them by the trained tokens of all calls.

    Args:
        base: the frozen model; a Base, or an nn.Module for examples that are tokenised already.
        start: the config of a new adapter, an adapter to go on from, or the sites whose W itself is trained.
        config: the settings of a step.
        dropout: on the low-rank path; a config's own by default.
        chat_template: for examples and prompts, in place of that of the config, the adapter or the tokenizer:
            a template, a file, the name of one, or a chat format.
        allow_different_base: go on from an adapter although it belongs to another base.
        settings: fields of `StepConfig` that replace those of `config`, such as `learning_rate=1e-3`.

    Gradients are on inside, whatever the caller's mode. Norms, rotary embeddings and MLPs run through own
    functions until `close`: their outputs are the base's up to rounding, where `attach` keeps every bit.

    Raises:
        TargetError, AttachError, BaseMismatchError: as `attach`.
        ConfigError: a value that cannot work, or a model that does not predict the next token.
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
        self.context = context_length(self.model)  # found once: it looks at every module
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
        """What was decided about the steps, with reasons."""
        assert self._prepared is not None
        return self._prepared

    @property
    def packed(self) -> bool:
        """Whether the packed pass is used; padded batches otherwise, and `step.forward_reason` says why."""
        return self.step.forward.name == "packed"

    @torch.inference_mode(False)
    def forward_backward(self, examples: Any, loss: LossFunction | None = None) -> StepResult:
        """Add the gradients of these examples to those that wait for `optim_step`.

        Args:
            examples: tokenised examples, or anything that `train` takes as data.
            loss: in place of cross-entropy: (logits of the trained positions (m×v, fp32 or wider), targets
                (m), weights (m), the examples' own divided by m) → scalar, averaged over the positions.

        Raises:
            NonFiniteError: the loss is not a finite number. After any error no gradient waits any more.
            DataError: the examples cannot be trained on.
            ConfigError: `loss` cannot be called so, or gives no scalar that depends on the logits.
        """
        self._check_open()
        if loss is not None:
            check_loss(loss)
        encoded = self.encode(examples)
        if not encoded:
            raise DataError("there is no example to learn from; give at least one")
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
                    before = "" if self.steps else f" (nothing is trained yet: {suspect} may be at fault)"
                    raise NonFiniteError(
                        f"the loss is {value.item()} in step {self.steps + 1}; lower the learning rate "
                        f"(it is {self.learning_rate:g}), use float32, or look for broken rows in the "
                        f"data{before}"
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
        """How the examples of one step are arranged over passes."""
        rows = [Row.of(example) for example in examples]
        return self.step.forward.passes(rows, self.micro_tokens, self.share_prefixes)

    def optim_step(self, learning_rate: float | None = None) -> float:
        """One AdamW step on the gradients that wait; returns their norm before clipping.

        Raises:
            TrainingError: no gradient waits, or a site ran and got none; the factors stay as they are.
            NonFiniteError: a gradient is not a finite number; the factors stay as they are.
        """
        self._check_open()
        if not self._pending_tokens:
            raise TrainingError(
                "there is no gradient to step on; call forward_backward() first, with examples that have a "
                "trained token"
            )
        self._refuse_unreached()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self._pending_tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        if not bool(torch.isfinite(norm)):
            self.zero_grad()
            raise NonFiniteError(
                f"a gradient is not a finite number in step {self.steps + 1}; lower the learning rate "
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
                some = encoded[start : start + EVALUATED_AT_ONCE]
                for part, outputs in self.step.forward.run(self.passes(some)):
                    total += outputs.summed_loss(None).item()
                    computed += part.computed_tokens
        trained = sum(example.trained for example in encoded)
        return StepResult(total / max(1, trained), trained, sum(len(e) for e in encoded), computed)

    def sample(self, prompts: Any, **options: Any) -> list[str]:
        """Answers of the model as it is now; options as `generate`."""
        self._check_open()
        with _no_dropout(self.attachment):
            options.setdefault("chat_template", self.chat.template if self.chat else None)
            return [answer.text for answer in generate(self.base, prompts, **options)]

    @cached_property
    def chat(self) -> ChatFormat | None:
        """How conversations are written; None without a tokenizer."""
        given, card = self._chat_template, self.attachment.card
        if self.base.tokenizer is None or isinstance(given, ChatFormat):
            return given if isinstance(given, ChatFormat) else None
        return ChatFormat(self.base.tokenizer, find_template(given) or (card.chat_template if card else None))

    def adapter(self) -> Adapter:
        """The adapter as it is now, as a value, with the chat template and the stop tokens in its card."""
        card, chat = self.attachment.card, self.chat
        if card is not None and chat is not None:
            stops = tuple(dict.fromkeys((*card.stop_tokens, *chat.stop_texts)))
            card = card.with_changes(chat_template=chat.template, stop_tokens=stops, task="CAUSAL_LM")
        return self.attachment.adapter(card)

    def save(self, folder: str | Path) -> None:
        """Write factors, optimiser and counters, from which `load` goes on to the same bits.

        Raises:
            TrainingError: a gradient waits for `optim_step`, which a checkpoint does not hold.
        """
        self._check_open()
        if self._pending_tokens:
            raise TrainingError(
                "a gradient waits for optim_step(), and a checkpoint holds none; step first, or zero_grad()"
            )
        save_session(self, Path(folder))

    def load(self, folder: str | Path) -> "Training":
        """Take over the state of a checkpoint that `save` wrote for the same base and sites.

        A gradient that waits for `optim_step` is dropped: it belongs to the state before.

        Raises:
            ResumeError: it belongs to another adapter, or is damaged.
        """
        self._check_open()
        load_session(self, Path(folder))
        self.zero_grad()
        return self

    def close(self) -> None:
        """Take the adapter out, if nobody did; the base is bit for bit what it was."""
        if self._closed:
            return
        self._closed = True
        if self._prepared is not None:
            self._prepared.fusion.remove()
        for module, mode in self._modes:
            module.training = mode
        if self.attachment.attached:
            self.attachment.detach()

    def encode(self, examples: Any) -> list[Example]:
        """Tokenised examples from anything that can be trained on."""
        if isinstance(examples, Example):
            examples = [examples]
        if isinstance(examples, Iterable) and not isinstance(examples, str | dict):
            examples = list(examples)
            if all(isinstance(example, Example) for example in examples):
                check_vocabulary(examples, self.model)
                check_lengths(examples, self.context, self.config.max_length)
                return examples
        limit = self.config.max_length or self.context
        encoded = list(encode(examples, self.base.tokenizer, max_length=limit, chat_template=self.chat))
        check_vocabulary(encoded, self.model)
        return encoded

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def zero_grad(self) -> None:
        """Drop the gradients that wait for `optim_step`."""
        self.optimizer.zero_grad(set_to_none=True)
        self._pending_tokens = 0
        self._micro_calls = 0
        self._ran.clear()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """An error inside leaves no gradient behind that nobody counts."""
        try:
            yield
        except BaseException:
            self.zero_grad()
            raise

    def ran(self) -> list[str]:
        """The sites that ran since the last `optim_step`."""
        return [path for path, module in self.attachment.modules.items() if module in self._ran]

    def unreached(self) -> list[str]:
        """The sites that ran since the last `optim_step` and got no gradient."""
        named = self.attachment.named_parameters()
        without = {name.rpartition(".")[0] for name, parameter in named if parameter.grad is None}
        return [path for path in self.ran() if path in without]

    def _refuse_unreached(self) -> None:
        """Check that every site that ran since the last step got a gradient.

        Raises:
            TrainingError: naming those that got none; no gradient waits then.
        """
        lost = self.unreached()
        if lost:
            self.zero_grad()
            more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
            rest = [path for path in self.attachment.sites if path not in lost]
            names = short_names(rest, [path for path, _ in self.model.named_modules()])
            flags = f" (--targets {','.join(names)})" if 0 < len(names) <= NAMED_TARGETS else ""
            raise TrainingError(
                f"{len(lost)} of {len(self.attachment.sites)} sites ran in step {self.steps + 1} and got no "
                f"gradient: {', '.join(lost[:4])}{more}; the model detaches their output, or does not use it "
                f"for its predictions: leave them out of the targets{flags}"
            )

    def _check_open(self) -> None:
        if self._closed or not self.attachment.attached:
            raise TrainingError(
                "this training was closed; make a new one, from its adapter if you want to go on"
            )

    def _dropout_seed(self) -> AbstractContextManager[None]:
        """Dropout follows from (seed, step, call): a resumed run draws what the whole run would have."""
        if not self.has_dropout:
            return nullcontext()
        return _seeded(dropout_seed(self.config.seed, self.steps, self._micro_calls))


@contextmanager
def _no_dropout(attachment: TrainableAttachment) -> Iterator[None]:
    """Context manager: switch the dropout of the low-rank path off."""
    attachment.train(False)
    try:
        yield
    finally:
        attachment.train()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Context manager: start torch's generators from this seed; afterwards they are as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
