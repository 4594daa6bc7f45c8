"""Encodes one prompt with each of several answers, to compare how likely they are.

It runs no model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from brushstroke.data.chat import ChatFormat
from brushstroke.data.encoder import tokenise
from brushstroke.data.examples import Example
from brushstroke.data.messages import Conversation
from brushstroke.data.pieces import Piece


def encode_answers(
    chat: ChatFormat, prompt: str | Conversation, answers: Sequence[str], *, row: int, where: str
) -> list[Example]:
    """The examples of a prompt with each answer, in which only that answer and its end are trained.

    Args:
        chat: the chat format.
        prompt: a conversation, or without a chat template a text.
        answers: the texts of the answers.
        row: the number of the prompt's row.
        where: the row, for error messages.

    Raises:
        DataError: the template does not print a prompt or an answer in full.
    """
    return tokenise(chat, [(row, pieces) for pieces in _written(chat, prompt, answers, where)])


def _written(
    chat: ChatFormat, prompt: str | Conversation, answers: Sequence[str], where: str
) -> Iterator[tuple[Piece, ...]]:
    if isinstance(prompt, str):
        end = Piece("", True, "completion", ids=chat.end_ids)
        for answer in answers:
            yield (*chat.plain_prompt(prompt), Piece(answer, True, "completion"), end)
        return
    untrained = (False,) * len(prompt.messages)
    for answer in answers:
        last = {"role": "assistant", "content": answer}
        conversation = replace(prompt, messages=(*prompt.messages, last), trained=(*untrained, True))
        yield chat.write(conversation, where=where).rows[-1]
