"""Finds which of several labels a model considers most likely as the answer to a prompt.

It generates nothing.
"""

from collections.abc import Callable, Iterator, Sequence

from brushstroke.data import ChatFormat, Example, encode_answers
from brushstroke.errors import ConfigError, DataError
from brushstroke.inference.loss import pass_tokens
from brushstroke.inference.questions import Question
from brushstroke.inference.scores import json_object
from brushstroke.packed.forward import Forward
from brushstroke.packed.pack import Row

MAX_LABELS = 20  # labels that are compared without being asked for
AT_ONCE = 256  # examples that are encoded and arranged over passes together

Choices = Sequence[str] | bool | None


def find_labels(expected: Sequence[str], choices: Choices = None) -> tuple[str, ...]:
    """The labels to choose from; none if there is no choice.

    Args:
        expected: the expected answer of each question.
        choices: the labels; True is all different expected answers, False none. None is all of them if they
            look like labels: no JSON objects, at most 20, and on average each at least twice.

    Raises:
        ConfigError: a label is given twice, or there are fewer than two.
    """
    if choices is False or not expected:
        return ()
    if choices is None or choices is True:
        found = tuple(dict.fromkeys(expected))
        few = 2 <= len(found) <= MAX_LABELS and 2 * len(found) <= len(expected)
        is_plain = few and all(text.strip() and json_object(text) is None for text in found)
        return found if choices or is_plain else ()
    labels = (choices,) if isinstance(choices, str) else tuple(choices)
    if len(set(labels)) < max(2, len(labels)):
        raise ConfigError(f"choices must be at least two different labels, not {', '.join(labels) or 'none'}")
    return labels


def likeliest(
    forward: Forward,
    chat: ChatFormat,
    questions: Sequence[Question],
    labels: Sequence[str],
    slot: int | None = None,
    *,
    max_length: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[str | None]:
    """For each question, the label with the highest probability as the whole answer, with its end.

    Two labels with exactly the same probability are no decision: the result is then None.

    Args:
        forward: from `loss_forward`.
        chat: the chat format of the adapter.
        questions: the prompts.
        labels: at least two different texts.
        slot: a slot of the bank in the model, 0 for the base; None uses the active route.
        max_length: the longest example in tokens.
        on_done: called with the number of finished questions.

    Raises:
        DataError: a prompt with a label is longer than `max_length`, or the template cannot write it.
    """
    found: list[str | None] = []
    per_group = max(1, AT_ONCE // len(labels))
    for start in range(0, len(questions), per_group):
        group = questions[start : start + per_group]
        examples = [
            example for question in group for example in _examples(chat, question, labels, max_length)
        ]
        losses = _losses(forward, examples, slot)
        for at in range(0, len(losses), len(labels)):
            found.append(_lowest(losses[at : at + len(labels)], labels))
        if on_done is not None:
            on_done(len(found))
    return found


def _examples(
    chat: ChatFormat, question: Question, labels: Sequence[str], max_length: int | None
) -> Iterator[Example]:
    examples = encode_answers(chat, question.prompt, labels, row=question.row, where=question.where)
    for example, label in zip(examples, labels, strict=True):
        if max_length is not None and len(example) > max_length:
            raise DataError(
                f"{question.where}: with the label {label!r} it has {len(example)} tokens, and the limit is "
                f"{max_length}; shorten it, or leave the choice out (choices=False, --choices none)"
            )
        yield example


def _losses(forward: Forward, examples: Sequence[Example], slot: int | None) -> list[float]:
    """−log p of the trained tokens of each example, in nats."""
    rows = [Row.of(example, slot) for example in examples]
    losses = dict.fromkeys(map(id, rows), 0.0)
    for packed, outputs in forward.run(forward.passes(rows, pass_tokens(forward), share=True)):
        counts = [len(row.wanted) for row in packed.rows]
        parts = outputs.target_losses().double().split(counts)
        losses |= {id(row): part.sum().item() for row, part in zip(packed.rows, parts, strict=True)}
    return [losses[id(row)] for row in rows]


def _lowest(losses: Sequence[float], labels: Sequence[str]) -> str | None:
    lowest = min(losses)
    found = [label for label, loss in zip(labels, losses, strict=True) if loss == lowest]
    return found[0] if len(found) == 1 else None
