"""How well a base answers a data set, with an adapter, several, or none.

The scores of answers are defined in `scores`, the loss in `loss`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.base import Base, context_length, require_base
from brushstroke.data import EncodedData, Example, Rows, encode, read_rows
from brushstroke.errors import ConfigError
from brushstroke.inference.decode import run_requests
from brushstroke.inference.generate import ONLY, Prompt, Voices, open_bank
from brushstroke.inference.loss import Loss, evaluate_loss
from brushstroke.inference.request import Sampling
from brushstroke.inference.scores import score
from brushstroke.layers import Bank

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one adapter (or the base) on a data set.

    Args:
        rows: rows of the data.
        loss: nats per trained token; None where no token is trained.
        trained_tokens: tokens whose prediction is in the loss.
        exact_match: share of answers that equal the expected text, see `Scores`.
        valid_json: share of answers that are one JSON object, see `Scores`.
        field_f1: over the (key, value) pairs of the objects, see `Scores`.
        seconds: wall time.
        answers: for each row that was answered {row, prompt, expected, answer, adapter}; rows count from 1.
    """

    rows: int
    loss: float | None
    trained_tokens: int
    exact_match: float | None
    valid_json: float | None
    field_f1: float | None
    seconds: float
    answers: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON types."""
        names = ("rows", "loss", "exact_match", "valid_json", "field_f1", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class _Question:
    """What a row asks, and what the answer should be."""

    row: int
    prompt: Prompt
    expected: str
    where: str
    tools: Sequence[Mapping] | None = None


def evaluate(
    base: Base,
    data: Any,
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    generate: bool = True,
    on_progress: Progress | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    allow_different_base: bool = False,
) -> Evaluation:
    """The loss on a data set, and how its questions are answered (greedily).

    A row of `messages` is judged on its last assistant turn, with what stands before it as the prompt; `text`
    and tokenised rows have a loss only.

    Args:
        base: the model and its tokenizer.
        data: whatever `read_rows` or `encode` reads.
        adapter: None is the base as it is, with whatever is attached to it.
        max_new_tokens: most tokens of an answer.
        batch_size: rows in one batch.
        generate: whether to answer at all; without it the loss alone is computed.
        on_progress: called with ("loss" or "answers", done, of).
        prompt_column: another name for `prompt`.
        completion_column: another name for `completion`.
        max_length: limit of an example in tokens for the loss; the model's context by default.
        chat_template: used instead of the one that the adapter was trained with.
        allow_different_base: use the adapter although its fingerprint says that it belongs to another base.

    Raises:
        DataError: rows that cannot be read, or do not fit the model's context.
        BaseMismatchError, ShapeError: an adapter that does not fit the base.
    """
    results = evaluate_all(
        base,
        data,
        {ONLY: adapter},
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        generate=generate,
        on_progress=None if on_progress is None else lambda _, *progress: on_progress(*progress),
        prompt_column=prompt_column,
        completion_column=completion_column,
        max_length=max_length,
        chat_template=chat_template,
        allow_different_base=allow_different_base,
    )
    return results[ONLY]


def evaluate_all(
    base: Base,
    data: Any,
    adapters: Mapping[str, Adapter | None],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    generate: bool = True,
    on_progress: Callable[[str, str, int, int], None] | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    allow_different_base: bool = False,
) -> dict[str, Evaluation]:
    """`evaluate` for several adapters on the same rows; an adapter that is None stands for the base.

    `on_progress` is called with (name, "loss" or "answers", done, of).
    """
    if not adapters:
        raise ConfigError("there is nothing to evaluate; give at least one name (with None for the base)")
    require_base(base)
    sampling = Sampling(max_new_tokens, batch_size=batch_size)
    source = data if isinstance(data, Rows) or _is_tokenised(data) else read_rows(data)
    context = context_length(base.model)
    limit = min((n for n in (max_length, context) if n is not None), default=None)
    results = {}
    trained = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    with open_bank(base, trained, allow_different_base=allow_different_base) as held:
        for name, adapter in adapters.items():
            started = time.perf_counter()
            card = adapter.card if adapter is not None else None
            template = chat_template or (card.chat_template if card else None)
            encoded = encode(
                source,
                base.tokenizer,
                prompt_column=prompt_column,
                completion_column=completion_column,
                max_length=limit,
                chat_template=template,
            )
            slot = name if adapter is not None else None
            report = partial(on_progress, name) if on_progress is not None else None
            loss = _loss(base, encoded, held, slot, batch_size, report)
            answers: list[dict[str, Any]] = []
            if generate and isinstance(source, Rows):
                questions = _questions(
                    source, encoded.report.kind, prompt_column or "prompt", completion_column or "completion"
                )
                answers = _answers(questions, Voices(base, held, chat_template), slot, sampling, report)
            scores = score((record["answer"], record["expected"]) for record in answers)
            results[name] = Evaluation(
                rows=encoded.report.rows,
                loss=loss.mean,
                trained_tokens=loss.trained_tokens,
                exact_match=scores.exact_match,
                valid_json=scores.valid_json,
                field_f1=scores.field_f1,
                seconds=time.perf_counter() - started,
                answers=tuple(answers),
            )
    return results


def _is_tokenised(data: Any) -> bool:
    if isinstance(data, EncodedData):
        return True
    return isinstance(data, Sequence) and bool(data) and isinstance(data[0], Example)


def _loss(
    base: Base,
    encoded: EncodedData,
    held: Bank | None,
    slot: str | None,
    batch_size: int,
    report: Progress | None,
) -> Loss:
    count = sum(1 for example in encoded if example.trained)
    on_done = None if report is None else lambda done: report("loss", done, count)
    with nullcontext() if held is None else held.rows(slot):
        return evaluate_loss(base, encoded.examples, batch_size=batch_size, on_done=on_done)


def _questions(rows: Rows, kind: str, prompt: str, completion: str) -> list[_Question]:
    questions = []
    for number, row in enumerate(rows.rows, start=1):
        where = rows.where(number)
        if kind == "prompt/completion":
            questions.append(_Question(number, row[prompt], row[completion], where))
        elif kind == "messages":
            messages = row["messages"]
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            expected = _content_text(messages[last])
            if last and expected is not None:  # an opening by the assistant answers nothing
                questions.append(_Question(number, messages[:last], expected, where, row.get("tools")))
    return questions


def _content_text(message: Mapping[str, Any]) -> str | None:
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _answers(
    questions: Sequence[_Question],
    voices: Voices,
    slot: str | None,
    sampling: Sampling,
    report: Progress | None,
) -> list[dict[str, Any]]:
    requests = [voices.request(q.prompt, slot, tools=q.tools, where=q.where) for q in questions]
    on_done = None if report is None else lambda done: report("answers", done, len(questions))
    outputs = run_requests(voices.base, requests, sampling, bank=voices.bank, on_done=on_done)
    return [
        {
            "row": question.row,
            "prompt": question.prompt,
            "expected": question.expected,
            "answer": voices.text(output.tokens),
            "adapter": slot,
        }
        for question, output in zip(questions, outputs, strict=True)
    ]
