"""The flags that `train` and `plan` share, and the configs made from them.

Only `LoraConfig` and `TrainConfig` contain defaults: a flag that is not given is None here.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from brushstroke.cli.values import Whole, WholeOrAuto, patterns, split
from brushstroke.errors import ConfigError

if TYPE_CHECKING:
    from brushstroke.adapter import LoraConfig
    from brushstroke.training import TrainConfig

ADAPTER, TRAINING, DATA, RUN = (
    Group("Adapter", sort_key=1),
    Group("Training", sort_key=2),
    Group("Data", sort_key=3),
    Group("Run", sort_key=4),
)
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Use = Literal["chosen", "text"] | None
Device = Literal["auto", "cpu", "cuda", "mps"]


@Parameter(name="*", group=ADAPTER)
@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Settings of the adapter.

    Args:
        rank: Rank r of every site [default: 8].
        alpha: Numerator of the scale [default: 16].
        scale_rule: The scale: alpha/rank, or alpha/√rank (rslora) [default: standard].
        targets: Modules to adapt: names, path endings, regular expressions, all-linear, attention or mlp;
            separated by commas [default: all-linear].
        rank_pattern: Other ranks for some targets: PATTERN=VALUE, separated by commas.
        alpha_pattern: Other alphas for some targets: PATTERN=VALUE, separated by commas.
        dropout: Dropout probability on the input of the low-rank path [default: 0].
        variant: Type of the update, such as lora for scale·U·V [default: lora].
        start: Continue training this adapter (a folder or a hub id) instead of a new one.
    """

    rank: Whole = None
    alpha: float | None = None
    scale_rule: Literal["standard", "rslora"] | None = None
    targets: str | None = None
    rank_pattern: str | None = None
    alpha_pattern: str | None = None
    dropout: float | None = None
    variant: str | None = None
    start: Annotated[Path | None, Parameter(name="--from")] = None

    def config(self) -> "LoraConfig | None":
        """The config; None if --from gives an adapter and no flag changes it.

        Raises:
            ConfigError: an invalid value.
        """
        from brushstroke.adapter import LoraConfig

        given = _given(self)
        given.pop("start", None)
        if self.start is not None:
            fixed = [f"--{name.replace('_', '-')}" for name in given if name != "dropout"]
            if fixed:
                raise ConfigError(
                    f"{', '.join(fixed)} cannot be combined with --from, because the adapter keeps its "
                    f"settings; leave {'it' if len(fixed) == 1 else 'them'} out"
                )
            return LoraConfig(**given) if given else None
        if self.targets is not None:
            given["targets"] = split(self.targets)
        if self.rank_pattern is not None:
            given["rank_pattern"] = patterns("--rank-pattern", self.rank_pattern, int)
        if self.alpha_pattern is not None:
            given["alpha_pattern"] = patterns("--alpha-pattern", self.alpha_pattern, float)
        return LoraConfig(**given)


@Parameter(name="*", group=TRAINING)
@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Settings of the training.

    Args:
        epochs: Passes over the data [default: 3].
        max_steps: Number of optimiser steps, instead of --epochs.
        learning_rate: Learning rate of AdamW [default: depends on the model's width; plan shows it].
        schedule: Learning rate after the warm-up: decays to zero over the run, or constant [default: linear].
        warmup: Steps of linear warm-up, or a fraction of the run if below 1 [default: 0].
        weight_decay: Weight decay of AdamW on the factors [default: 0].
        clip: Maximum norm of the whole gradient; 0 turns clipping off [default: 1].
        batch_size: Examples per optimiser step [default: 8].
        micro_tokens: Tokens computed in one pass, or auto; affects only memory and speed [default: auto].
        memory: low saves fewer activations and recomputes them; auto is fast if that fits [default: auto].
        gradient_checkpointing: Recompute activations in the backward pass: less memory, but slower.
        torch_compile: On a GPU, compile the operations between matrix products; for large models and long
            runs.
        share_prefixes: Compute a prefix that examples of a step share only once [default: on, unless dropout
            is used].
        eval_every: Steps between evaluations [default: once an epoch].
        patience: End after this many evaluations without a lower loss [default: no early end].
        keep_best: Save the adapter with the lowest evaluation loss instead of the last one.
        checkpoint_every: Optimiser steps between checkpoints; the last two are kept [default: 100].
        seed: Seed of the initial factors, the order of the data, and dropout [default: 0].
    """

    epochs: float | None = None
    max_steps: Whole = None
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    batch_size: Whole = None
    micro_tokens: WholeOrAuto = None
    memory: Literal["auto", "low", "fast"] | None = None
    gradient_checkpointing: bool | None = None
    torch_compile: bool | None = None
    share_prefixes: bool | None = None
    eval_every: Whole = None
    patience: Whole = None
    keep_best: bool | None = None
    checkpoint_every: Whole = None
    seed: Whole = None


@Parameter(name="*", group=DATA)
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How to read the data.

    Args:
        prompt: Name of the column with the prompts [default: prompt].
        completion: Name of the column with the completions [default: completion].
        use: Train the chosen answers of preference data, or the texts of data with text and label.
        max_length: Longest example in tokens [default: the model's context].
        skip_too_long: Leave out examples whose prompt fills --max-length, instead of refusing them.
        split_turns: Make an example of every assistant turn, written as the model will see it.
        chat_template: A Jinja file, or chatml, llama3, gemma or alpaca [default: the tokenizer's own].
        date: The date of "today" in the chat template, YYYY-MM-DD [default: the day on which the run began].
        eval_data: Data to evaluate on, or the share of the rows to hold out for it, such as 0.1 or 10%.
    """

    prompt: str | None = None
    completion: str | None = None
    use: Use = None
    max_length: Whole = None
    skip_too_long: bool | None = None
    split_turns: bool | None = None
    chat_template: str | None = None
    date: str | None = None
    eval_data: Annotated[str | None, Parameter(name="--eval")] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """How the base is loaded, and the format of the output.

    Args:
        dtype: Dtype of the frozen base; auto is bfloat16 if the hardware supports it natively.
        device: The device to run on.
        quantize: Store the weights of the base's linear layers in 4 bits (bitsandbytes' NF4).
        allow_different_base: Allow adapters that were trained on another base.
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        json: Print JSON on stdout, for programs.
    """

    dtype: Dtype = "auto"
    device: Device = "auto"
    quantize: Literal["nf4"] | None = None
    allow_different_base: bool = False
    trust_remote_code: bool = False
    json: bool = False


@Parameter(name="*", group=RUN)
@dataclass(frozen=True, kw_only=True)
class RunOptions(BaseOptions):
    """Settings of the run."""


def train_config(training: TrainingOptions | None, data: DataOptions | None) -> "TrainConfig":
    """The training config from the flags.

    Raises:
        ConfigError: an invalid value.
    """
    from brushstroke.training import TrainConfig

    given = _given(training or TrainingOptions())
    for name in ("max_length", "skip_too_long", "split_turns", "chat_template", "date"):
        value = getattr(data, name, None)
        if value is not None:
            given[name] = value
    return TrainConfig(**given)


def _given(options: Any) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: value for name, value in values.items() if value is not None}
