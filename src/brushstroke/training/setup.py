"""What `train` and `plan` have in common: tokenised data, and the session that the settings ask for.

It runs no step.
"""

from typing import Any

import torch

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base, check_max_length, context_length, require_base
from brushstroke.data import ChatFormat, EncodedData, encode, find_template
from brushstroke.errors import ConfigError
from brushstroke.training.check import check_vocabulary
from brushstroke.training.config import TrainConfig
from brushstroke.training.session import Training


def make_chat(
    base: Base, config: TrainConfig, start: Adapter | None = None, date: str | None = None
) -> ChatFormat | None:
    """The chat format of a run: the config's, that of the adapter that it goes on from, or the base's own.

    Args:
        base: with its tokenizer; without one there is no chat format.
        config: of the run.
        start: the adapter to go on from.
        date: on which an interrupted run began.

    Raises:
        ConfigError: `base` is no Base, or there is no such template.
    """
    require_base(base)
    if base.tokenizer is None:
        return None
    template = find_template(config.chat_template)
    if template is None and start is not None and start.card is not None:
        template = start.card.chat_template
    return ChatFormat(base.tokenizer, template, date=config.date or date)


def read_data(
    base: Base,
    data: Any,
    config: TrainConfig,
    chat: ChatFormat | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> EncodedData:
    """Tokenise data for a run.

    Raises:
        ConfigError: `base` is no Base of a language model, or the limit is beyond its context.
        DataError: the data cannot be read or trained on.
    """
    require_base(base)
    check_max_length(base.model, config.max_length)
    encoded = encode(
        data,
        base.tokenizer,
        prompt_column=prompt_column,
        completion_column=completion_column,
        max_length=config.max_length or context_length(base.model),
        skip_too_long=config.skip_too_long,
        split_turns=config.split_turns,
        chat_template=chat,
    )
    check_vocabulary(encoded, base.model)
    return encoded


def check_lora(lora: LoraConfig | None) -> None:
    """Check what a run is asked to make, before anything is read.

    Raises:
        ConfigError: an adapter in place of a config, or a scale that no float32 holds.
    """
    if isinstance(lora, Adapter):
        raise ConfigError("got an adapter in place of a LoraConfig; to go on from it, pass it as start=")
    alphas = (lora.alpha, *lora.alpha_pattern.values()) if lora else ()
    if any(alpha > torch.finfo(torch.float32).max for alpha in alphas):
        raise ConfigError(f"alpha must be a number that float32 holds; got {max(alphas):g}")


def open_session(
    base: Base,
    lora: LoraConfig | None,
    config: TrainConfig,
    start: Adapter | None,
    allow_different_base: bool = False,
    chat: ChatFormat | None = None,
) -> Training:
    """The training session that a config asks for.

    Raises:
        ConfigError: a config that asks for another adapter than the one to go on from.
    """
    if start is not None and lora is not None and lora != LoraConfig(dropout=lora.dropout):
        raise ConfigError(
            "an adapter to go on from keeps its own rank, scale and targets; give a LoraConfig with no "
            "more than dropout, or no adapter"
        )
    return Training(
        base,
        start if start is not None else lora or LoraConfig(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        clip=config.clip,
        micro_tokens=config.micro_tokens,
        memory=config.memory,
        gradient_checkpointing=config.gradient_checkpointing,
        torch_compile=config.torch_compile,
        share_prefixes=config.share_prefixes,
        seed=config.seed,
        dropout=lora.dropout if lora else None,
        max_length=config.max_length,
        chat_template=chat,
        allow_different_base=allow_different_base,
    )
