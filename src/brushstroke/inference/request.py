"""Requests to a model as tokens: prompts, sampling parameters, answers.

It runs no model: `batching` and `run_batch` do.
"""

from dataclasses import dataclass
from typing import Literal

from brushstroke.checks import check_integer, check_number
from brushstroke.errors import ConfigError

Finish = Literal["stop", "length"]

MIN_TEMPERATURE = 1e-4  # division of the logits by a smaller value overflows


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of an answer.

    Args:
        max_new_tokens: maximum number of tokens of an answer, including its stop token.
        temperature: 0 always takes the most probable token (greedy).
        top_p: with a temperature, sample only from the most probable tokens with this total probability.
        seed: of the random draws.
        num_beams: width of a beam search; 1 disables it.

    Raises:
        ConfigError: an invalid value; the message names the field.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens)
        check_integer("num_beams", self.num_beams)
        check_integer("seed", self.seed, 0, 2**63 - 1)
        check_number("top_p", self.top_p, above=0, at_most=1)
        check_number("temperature", self.temperature, at_least=0)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ConfigError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}; got {self.temperature!r}"
            )


def check_batch_size(batch_size: int) -> None:
    """Check the number of rows per batch.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    check_integer("batch_size", batch_size)


@dataclass(frozen=True)
class Request:
    """One prompt: its tokens, the adapter that answers (None is the base), stops and sampling parameters.

    `stop_token_ids` and `stop_strings` (texts of several tokens) end an answer. `source` names the prompt in
    error messages.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    source: str = "the prompt"
    stop_strings: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True)
class Output:
    """The tokens of an answer without its stop token, and the reason why it ended.

    If a stop string ended it, `stop_string` is that string, and the tokens include it.
    """

    tokens: tuple[int, ...]
    finish: Finish
    stop_string: str | None = None
