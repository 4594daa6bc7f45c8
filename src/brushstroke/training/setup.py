"""What `train`, `plan` and the studies have in common: the request, its tokenised data, and its session.

It runs no step.
"""

from dataclasses import dataclass
from typing import Any

import torch

from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.base import Base, check_max_length, context_length, require_base
from brushstroke.data import ChatFormat, EncodedData, encode, find_template
from brushstroke.errors import ConfigError
from brushstroke.packed import LossFunction
from brushstroke.training.check import check_vocabulary
from brushstroke.training.config import TrainConfig
from brushstroke.training.session import Training


@dataclass(frozen=True)
class RunRequest:
    """What a run is asked to do, apart from its base, its data and its folder. For the fields see `train`.

    Raises:
        ConfigError: an adapter in place of a LoraConfig, a scale that no float32 holds, or a LoraConfig that
            asks for another adapter than the one to go on from.
    """

    config: TrainConfig
    lora: LoraConfig | None = None
    start: Adapter | None = None
    loss: LossFunction | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    allow_different_base: bool = False

    def __post_init__(self) -> None:
        lora = self.lora
        if isinstance(lora, Adapter):
            raise ConfigError("got an adapter in place of a LoraConfig; to go on from it, pass it as start=")
        alphas = (lora.alpha, *lora.alpha_pattern.values()) if lora else ()
        if any(alpha > torch.finfo(torch.float32).max for alpha in alphas):
            raise ConfigError(f"alpha must be a number that float32 holds; got {max(alphas):g}")
        if self.start is not None and lora is not None and lora != LoraConfig(dropout=lora.dropout):
            raise ConfigError(
                "an adapter to go on from keeps its own rank, scale and targets; give a LoraConfig with no "
                "more than dropout, or no adapter"
            )


def make_chat(base: Base, request: RunRequest, date: str | None = None) -> ChatFormat | None:
    """The chat format of a run: the config's, that of the adapter that it goes on from, or the base's own.

    Args:
        base: with its tokenizer; without one there is no chat format.
        request: of the run.
        date: on which an interrupted run began.

    Raises:
        ConfigError: `base` is no Base, or there is no such template.
    """
    require_base(base)
    if base.tokenizer is None:
        return None
    config, start = request.config, request.start
    template = find_template(config.chat_template)
    if template is None and start is not None and start.card is not None:
        template = start.card.chat_template
    return ChatFormat(base.tokenizer, template, date=config.date or date)


def read_data(base: Base, data: Any, request: RunRequest, chat: ChatFormat | None = None) -> EncodedData:
    """Tokenise data for a run.

    Raises:
        ConfigError: `base` is no Base of a language model, or the limit is beyond its context.
        DataError: the data cannot be read or trained on.
    """
    require_base(base)
    config = request.config
    check_max_length(base.model, config.max_length)
    encoded = encode(
        data,
        base.tokenizer,
        prompt_column=request.prompt_column,
        completion_column=request.completion_column,
        max_length=config.max_length or context_length(base.model),
        skip_too_long=config.skip_too_long,
        split_turns=config.split_turns,
        chat_template=chat,
    )
    check_vocabulary(encoded, base.model)
    return encoded


def open_session(base: Base, request: RunRequest, chat: ChatFormat | None = None) -> Training:
    """The training session that a request asks for."""
    return Training(
        base,
        request.lora if request.start is None else request.start,
        request.config,
        dropout=request.lora.dropout if request.lora else None,
        chat_template=chat,
        allow_different_base=request.allow_different_base,
    )
