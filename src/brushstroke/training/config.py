"""The settings of a training run; the flags of the command line have the same names.

It does not describe the adapter: `LoraConfig` does.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from brushstroke.checks import check_choice, check_integer, check_number
from brushstroke.data import Template, find_template
from brushstroke.data.template import read_date
from brushstroke.errors import refuse_unknown
from brushstroke.packed.memory import MODES
from brushstroke.training.schedule import SCHEDULES

MAX_SEED = 2**63 - 1  # limit of torch's generators, with room for what is added to the seed


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The settings of one optimiser step. Anything not listed here is as in the Hugging Face Trainer.

    Args:
        learning_rate: of AdamW (betas 0.9 and 0.999, eps 1e-8); None is 5e-4·(2000 / hidden width)^0.781, the
            published fit for LoRA.
        weight_decay: of AdamW, applied to the factors.
        clip: maximum norm of the whole gradient; 0 disables clipping.
        micro_tokens: maximum number of computed tokens in one forward and backward pass. Memory and speed
            depend on it, and also which values dropout drops. "auto" derives it from the machine's total
            memory, the model and this config.
        memory: "low" saves fewer activations, recomputes the others and uses smaller passes; "fast" saves all
            activations whose recomputation costs time; "auto" is "fast" if that fits into the machine's total
            memory.
        gradient_checkpointing: recompute activations in the backward pass: less memory, slower.
        torch_compile: on a GPU, compile norms, rotary embeddings and gated activations into one kernel each:
            some seconds for each new size of pass, and faster steps for large models.
        share_prefixes: compute a prefix that several examples of a step share only once. None does this
            unless dropout is on (the examples would share the dropped values).
        max_length: maximum example length in tokens, at most the model's context (None: the context).
        chat_template: used instead of the tokenizer's own: a template, a file, or the name of a template.
        seed: for the initial factors, the order of the data and dropout.

    Raises:
        ConfigError: an invalid value; the message names the field.
    """

    learning_rate: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    micro_tokens: int | str = "auto"
    memory: str = "auto"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    share_prefixes: bool | None = None
    max_length: int | None = None
    chat_template: Template = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, above=0)
        check_number("weight_decay", self.weight_decay, at_least=0)
        check_number("clip", self.clip, at_least=0)
        check_integer("seed", self.seed, 0, MAX_SEED)
        if self.max_length is not None:
            check_integer("max_length", self.max_length)
        if self.micro_tokens != "auto":
            check_integer("micro_tokens (if not 'auto')", self.micro_tokens)
        check_choice("memory", self.memory, MODES)
        object.__setattr__(self, "chat_template", find_template(self.chat_template))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """How to train: the settings of a step, and those of the run around it.

    Args:
        epochs: passes over the data, if `max_steps` is None.
        max_steps: number of optimiser steps, instead of epochs; None uses the epochs.
        schedule: "linear" (to zero over the run), "cosine" or "constant", after the warm-up.
        warmup: steps of linear warm-up, or a share of the run if it is below 1.
        batch_size: examples per optimiser step; it affects the result of the training.
        skip_too_long: leave out examples whose prompt reaches the maximum length, instead of refusing them.
        split_turns: make one example of every assistant turn, with the prompt that the model will see then.
        date: today's date for the chat template (YYYY-MM-DD); None is the day on which the run began.
        eval_every: steps between evaluations; None evaluates at the end of each epoch.
        patience: end the run after so many evaluations without a lower loss; None runs to the end.
        keep_best: return the adapter with the lowest evaluation loss instead of the last one.
        checkpoint_every: optimiser steps between checkpoints; the last two are kept.

    Raises:
        ConfigError: an invalid value; the message names the field.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    schedule: str = "linear"
    warmup: float = 0.0
    batch_size: int = 8
    skip_too_long: bool = False
    split_turns: bool = False
    date: str | None = None
    eval_every: int | None = None
    patience: int | None = None
    keep_best: bool = False
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_steps", "batch_size", "eval_every", "patience", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value)
        check_number("epochs", self.epochs, above=0)
        check_number("warmup", self.warmup, at_least=0)
        if self.date is not None:
            read_date(self.date)
        check_choice("schedule", self.schedule, SCHEDULES)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `as_dict`; an unknown key is an error."""
        refuse_unknown(settings, (field.name for field in dataclasses.fields(cls)), "a training config")
        return cls(**settings)


LORA_OVER_FULL = 10  # ratio of the best learning rates: low-rank factors to full fine-tuning of W


def default_learning_rate(hidden: int | None) -> float:
    """5e-5·10·(2000 / hidden)^0.781: ten times that of full fine-tuning; wider models get smaller values.

    The fit is by Thinking Machines for Llama models ("LoRA Without Regret", 2025, and its cookbook). 5e-4 if
    the width is unknown. Rounded to two significant digits.

    >>> default_learning_rate(576), default_learning_rate(4096)
    (0.0013, 0.00029)
    """
    return float(f"{5e-4 * (2000 / hidden) ** 0.781:.1e}") if hidden else 5e-4
