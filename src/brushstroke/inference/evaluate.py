"""Evaluates a base on a data set, with one adapter, several, or none.

It does not define the metrics: see `scores` and `loss`.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from brushstroke.adapter import Adapter
from brushstroke.base import Base, check_max_length, context_length, refuse_unknown_tokens, require_base
from brushstroke.data import (
    ChatFormat,
    Columns,
    DataWarning,
    EncodedData,
    Example,
    Reply,
    Rows,
    Template,
    encode,
    find_columns,
    read_row,
    read_rows,
)
from brushstroke.errors import ConfigError
from brushstroke.inference.batching import run_requests
from brushstroke.inference.generate import ONLY, Prompt, PromptEncoder, open_bank, shown_prompt, tools_of
from brushstroke.inference.loss import Loss, loss_forward, total_loss
from brushstroke.inference.request import Output, SamplingParams, check_batch_size
from brushstroke.inference.scores import score

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one adapter (or the base) on a data set.

    Args:
        rows: number of rows in the data.
        loss: nats per trained token; None if there is no trained token.
        trained_tokens: tokens whose prediction is in the loss.
        exact_match: share of answers that equal the expected text, see `Scores`.
        contains: share of answers that contain the expected text, see `Scores`.
        final_answer: share of answers with the right text after "####", see `Scores`.
        valid_json: share of answers that are one JSON object, see `Scores`.
        field_f1: F1 of the (key, value) pairs of the objects, see `Scores`.
        seconds: wall time.
        answers: for each answered row {row, prompt, expected, answer, adapter}; rows count from 1. With tool
            calls also {expected_calls, calls}, with reasoning {reasoning}.
    """

    rows: int
    loss: float | None
    trained_tokens: int
    exact_match: float | None
    contains: float | None
    final_answer: float | None
    valid_json: float | None
    field_f1: float | None
    seconds: float
    answers: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON types."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("answers", "trained_tokens")
        }


@dataclass(frozen=True)
class _Question:
    """The prompt of a row, the expected answer, and that answer as the chat template writes it."""

    row: int
    prompt: Prompt
    shown: Any
    expected: Reply
    written: str
    where: str


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
    split_turns: bool = False,
    tools: Sequence[Any] = (),
    chat_template: Template = None,
    date: str | None = None,
    allow_different_base: bool = False,
) -> Evaluation:
    """The loss on a data set, and the scores of the generated answers (greedy decoding).

    For a row of `messages`, the expected answer is the last assistant turn, and the prompt is everything
    before it. `text` and tokenised rows have only a loss.

    Args:
        base: the model and its tokenizer.
        data: any data that `read_rows` or `encode` accepts.
        adapter: the adapter; None is the base in its current state, including an attached adapter.
        max_new_tokens: maximum number of tokens of an answer.
        batch_size: number of rows that are answered in one batch.
        generate: whether to generate answers; if not, only the loss is computed.
        on_progress: called with ("loss" or "answers", done, total).
        prompt_column: another name for `prompt`.
        completion_column: another name for `completion`.
        max_length: maximum example length in tokens for the loss; the model's context by default.
        split_turns: compute the loss of every assistant turn as a separate example, as in training.
        tools: declarations of functions, for rows that have none.
        chat_template: used instead of the template that the adapter was trained with.
        date: today's date for chat templates (YYYY-MM-DD); by default the day of the adapter's training.
        allow_different_base: use the adapter although its fingerprint belongs to another base.

    Raises:
        DataError: rows that cannot be read, or do not fit the model's context.
        BaseMismatchError, ShapeError: an adapter that does not fit the base.

    Warns:
        DataWarning: rows without an expected answer.
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
        split_turns=split_turns,
        tools=tools,
        chat_template=chat_template,
        date=date,
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
    split_turns: bool = False,
    tools: Sequence[Any] = (),
    chat_template: Template = None,
    date: str | None = None,
    allow_different_base: bool = False,
) -> dict[str, Evaluation]:
    """`evaluate` for several adapters on the same rows; None as an adapter is the base.

    `on_progress` is called with (name, "loss" or "answers", done, total).
    """
    if not adapters:
        raise ConfigError(
            "no adapters given, so there is nothing to evaluate; give at least one name (None as its adapter "
            "is the base)"
        )
    require_base(base)
    check_max_length(base.model, max_length)
    check_batch_size(batch_size)
    sampling = SamplingParams(max_new_tokens)
    source = data
    if not (isinstance(data, Rows) or _is_tokenised(data)):
        source = read_rows(data, prompt=prompt_column, completion=completion_column)
    context = context_length(base.model)
    limit = min((n for n in (max_length, context) if n is not None), default=None)
    trained = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    seconds = dict.fromkeys(adapters, 0.0)
    encoded: dict[str, EncodedData] = {}
    losses: dict[str, Loss] = {}
    results: dict[str, Evaluation] = {}
    with open_bank(base, trained, allow_different_base=allow_different_base) as bank:
        encoder = PromptEncoder(base, bank, chat_template, date) if base.tokenizer is not None else None
        named = {name: name if name in trained else None for name in adapters}
        for name, adapter in named.items():
            encoded[name] = encode(
                source,
                base.tokenizer,
                prompt_column=prompt_column,
                completion_column=completion_column,
                max_length=limit,
                split_turns=split_turns,
                chat_template=encoder.format(adapter) if encoder else None,
                tools=tools,
            )
            for example in encoded[name]:
                refuse_unknown_tokens(base.model, example.tokens, f"{encoded[name].name}, row {example.row}")
        with loss_forward(base) as forward:
            for name, adapter in named.items():
                with _clock(seconds, name):
                    examples = encoded[name].examples
                    count = sum(1 for example in examples if example.trained)
                    done = _reporter(on_progress, name, "loss", count)
                    slot = None if bank is None else bank.slot(adapter)
                    losses[name] = total_loss(forward, examples, slot, done)
        for name, adapter in named.items():
            answers: list[dict[str, Any]] = []
            right: list[bool] = []
            if generate and encoder and isinstance(source, Rows):
                columns = find_columns(source, prompt_column, completion_column)
                questions = _questions(source, columns, encoder.format(adapter), tools)
                done = _reporter(on_progress, name, "answers", len(questions))
                with _clock(seconds, name):
                    answers, right = _answers(questions, encoder, adapter, sampling, batch_size, done)
                if 0 < len(questions) < len(source):
                    lacking = f"{len(source) - len(questions)} of {len(source)} rows have no expected answer"
                    warnings.warn(f"{lacking}; only their loss counts", DataWarning, stacklevel=2)
            results[name] = _evaluation(encoded[name], losses[name], answers, right, seconds[name])
    return results


def _evaluation(
    data: EncodedData, loss: Loss, answers: Sequence[dict[str, Any]], right: Sequence[bool], seconds: float
) -> Evaluation:
    texts = [record for record in answers if not record.get("expected_calls")]
    # an answer that calls a tool where a text was expected is wrong
    pairs = [("" if record.get("calls") else record["answer"], record["expected"]) for record in texts]
    scores = score(pairs, right)
    return Evaluation(
        rows=data.report.rows,
        loss=loss.mean,
        trained_tokens=loss.trained_tokens,
        **asdict(scores),
        seconds=seconds,
        answers=tuple(answers),
    )


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Context manager: add the elapsed time to the seconds of an adapter."""
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def _reporter(
    on_progress: Callable[[str, str, int, int], None] | None, name: str, what: str, count: int
) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress(name, what, done, count)


def _is_tokenised(data: Any) -> bool:
    if isinstance(data, EncodedData):
        return True
    return isinstance(data, Sequence) and bool(data) and isinstance(data[0], Example)


def _questions(rows: Rows, columns: Columns, chat: ChatFormat, tools: Sequence[Any]) -> list[_Question]:
    questions = []
    for number, row in enumerate(rows.rows, start=1):
        where = rows.where(number)
        if columns.kind == "prompt/completion" and not chat.has_template:
            prompt, completion = (row[name] for name in columns.names)
            questions.append(_Question(number, prompt, prompt, Reply(completion), completion, where))
        elif columns.kind in ("messages", "prompt/completion"):
            conversation = read_row(row, columns, where, tools=tools)
            last = max((i for i in conversation.answers if conversation.trained[i]), default=0)
            if not last:  # the assistant's opening turn answers no prompt
                continue
            expected, written = chat.last_answer(conversation.until(last + 1), where=where)
            if not (expected.content or expected.tool_calls):
                continue
            prompt = conversation.until(last)
            is_text = columns.kind != "messages" and last == 1
            shown = prompt.messages[0]["content"] if is_text else shown_prompt(prompt)
            questions.append(_Question(number, prompt, shown, expected, written, where))
    return questions


def _answers(
    questions: Sequence[_Question],
    encoder: PromptEncoder,
    adapter: str | None,
    sampling: SamplingParams,
    batch_size: int,
    on_done: Callable[[int], None] | None,
) -> tuple[list[dict[str, Any]], list[bool]]:
    """A record of every answer; and for each answer with tool calls, whether the calls are right."""
    requests = [
        encoder.request(question.prompt, adapter, source=question.where, sampling=sampling)
        for question in questions
    ]
    outputs = run_requests(encoder.base, requests, batch_size=batch_size, bank=encoder.bank, on_done=on_done)
    records, right = [], []
    for question, output in zip(questions, outputs, strict=True):
        reply = encoder.reply(output, adapter, tools_of(question.prompt))
        expected = question.expected
        record = {
            "row": question.row,
            "prompt": question.shown,
            "expected": expected.content,
            "answer": reply.content,
            "adapter": adapter,
        }
        if reply.reasoning:
            record["reasoning"] = reply.reasoning
        if expected.tool_calls or reply.tool_calls:
            record |= {"expected_calls": list(expected.tool_calls), "calls": list(reply.tool_calls)}
        if expected.tool_calls:
            right.append(_same_calls(reply, question, encoder, output, adapter))
        records.append(record)
    return records, right


def _same_calls(
    reply: Reply, question: _Question, encoder: PromptEncoder, output: Output, adapter: str | None
) -> bool:
    """Whether an answer has the expected text and tool calls; compares raw texts if calls are unreadable."""
    expected = question.expected
    readable = encoder.format(adapter).read_reply(question.written, tools_of(question.prompt))
    if not readable.calls_like(expected):
        return encoder.raw(output).strip() == question.written.strip()
    return reply.calls_like(expected) and reply.content.split() == expected.content.split()
