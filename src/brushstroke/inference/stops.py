"""Where an answer ends: at a token, or at a string of several tokens.

It runs no model.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brushstroke.inference.request import Output, Request

SPARE = 8  # tokens more than a string has bytes: all that can hold it


class Stops:
    """The stop tokens and stop strings of one batch.

    Args:
        tokenizer: decodes, where there are strings.
        request: any of the batch, whose requests end alike.
    """

    def __init__(self, tokenizer: Any, request: Request) -> None:
        self._tokenizer, self.tokens, self.strings = tokenizer, request.stop_token_ids, request.stop_strings
        self._window = SPARE + max((len(string.encode()) for string in self.strings), default=0)

    def reached(self, ids: Tensor, width: int) -> Tensor:
        """For each row of ids (b×n), whether its last token ends it; `width` tokens are the prompt."""
        ends = torch.tensor(self.tokens, dtype=torch.long, device=ids.device)
        found = torch.isin(ids[:, -1], ends)
        if self.strings:
            tails = ids[:, max(width, ids.shape[1] - self._window) :].tolist()
            found |= torch.tensor([self._string_in(tail) is not None for tail in tails], device=ids.device)
        return found

    def output(self, tokens: Sequence[int]) -> Output:
        """The answer in the tokens behind a prompt."""
        end = next((index for index, token in enumerate(tokens) if token in self.tokens), None)
        answer = list(tokens if end is None else tokens[:end])
        if self.strings and (string := self._string_in(answer)) is not None:
            count = bisect.bisect_left(
                range(len(answer)), True, key=lambda n: self._string_in(answer[: n + 1]) is not None
            )
            return Output(tuple(answer[: count + 1]), "stop", string)
        return Output(tuple(answer), "length" if end is None else "stop")

    def _string_in(self, tokens: Sequence[int]) -> str | None:
        """The stop string that comes first in the text of tokens."""
        text = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        places = [(place, string) for string in self.strings if (place := text.find(string)) >= 0]
        return min(places)[1] if places else None
