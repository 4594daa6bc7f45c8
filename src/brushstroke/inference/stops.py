"""Finds the end of an answer: a stop token, or a stop string of several tokens.

It runs no model.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brushstroke.inference.request import Output, Request

EXTRA_TOKENS = 8  # a stop string fits in this many tokens more than it has bytes


class Stops:
    """The stop tokens and stop strings of one batch.

    Args:
        tokenizer: decodes tokens; needed only with stop strings.
        request: any request of the batch; all have the same stops.
    """

    def __init__(self, tokenizer: Any, request: Request) -> None:
        self._tokenizer, self.tokens, self.strings = tokenizer, request.stop_token_ids, request.stop_strings
        self._window = EXTRA_TOKENS + max((len(string.encode()) for string in self.strings), default=0)

    def reached(self, ids: Tensor, width: int) -> Tensor:
        """For each row of ids (b×n), whether its last token ends the answer; the prompt has `width`."""
        ends = torch.tensor(self.tokens, dtype=torch.long, device=ids.device)
        found = torch.isin(ids[:, -1], ends)
        if self.strings:
            tails = ids[:, max(width, ids.shape[1] - self._window) :].tolist()
            found |= torch.tensor([self._string_in(tail) is not None for tail in tails], device=ids.device)
        return found

    def output(self, tokens: Sequence[int]) -> Output:
        """The answer in the tokens after a prompt."""
        end = next((index for index, token in enumerate(tokens) if token in self.tokens), None)
        answer = list(tokens if end is None else tokens[:end])
        if self.strings and (string := self._string_in(answer)) is not None:
            count = bisect.bisect_left(
                range(len(answer)), True, key=lambda n: self._string_in(answer[: n + 1]) is not None
            )
            return Output(tuple(answer[: count + 1]), "stop", string)
        return Output(tuple(answer), "length" if end is None else "stop")

    def _string_in(self, tokens: Sequence[int]) -> str | None:
        """The first stop string in the text of the tokens, or None."""
        text = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        places = [(place, string) for string in self.strings if (place := text.find(string)) >= 0]
        return min(places)[1] if places else None
