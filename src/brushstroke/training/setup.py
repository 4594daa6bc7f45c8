"""Code shared by `train`, `plan` and the studies: the request, its tokenised data, and its session.

It runs no training step.
"""

from dataclasses import dataclass
from typing import Any

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
    """The arguments of a run except its base, its data and its folder. For the fields see `train`.

    Raises:
        ConfigError: an adapter instead of a LoraConfig, a scale outside the range of float32, or a
            LoraConfig that contradicts the start adapter.
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
            raise ConfigError(
                "got an adapter instead of a LoraConfig; to continue its training, pass it as start="
            )
        if self.start is not None and lora is not None and lora != LoraConfig(dropout=lora.dropout):
            raise ConfigError(
                "a start adapter keeps its own rank, scale and targets; give a LoraConfig that sets only "
                "dropout, or give no start adapter"
            )


def make_chat(base: Base, request: RunRequest, date: str | None = None) -> ChatFormat | None:
    """The chat format of a run: from the config, else from the start adapter, else from the base.

    Args:
        base: a base; without a tokenizer there is no chat format.
        request: of the run.
        date: the day on which an interrupted run began.

    Raises:
        ConfigError: `base` is not a Base, or there is no such template.
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
        ConfigError: `base` is not a Base with a language model, or max_length exceeds its context.
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
    """The training session for a request."""
    return Training(
        base,
        request.lora if request.start is None else request.start,
        request.config,
        dropout=request.lora.dropout if request.lora else None,
        chat_template=chat,
        allow_different_base=request.allow_different_base,
    )
