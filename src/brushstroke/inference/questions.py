"""The questions of a data set: prompts with expected answers, and the answers of a model to them.

It computes no scores: see `scores`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from brushstroke.data import ChatFormat, Columns, Conversation, Reply, Rows, read_row
from brushstroke.inference.batching import run_requests
from brushstroke.inference.generate import PromptEncoder, shown_prompt, tools_of
from brushstroke.inference.request import Output, SamplingParams


@dataclass(frozen=True)
class Question:
    """A prompt and the expected answer to it.

    Args:
        row: the number of the row (from 1).
        prompt: everything before the answer; a text if there is no chat template.
        shown: the prompt as JSON types.
        expected: the answer.
        written: the answer as the chat template writes it.
        where: the row, for error messages.
    """

    row: int
    prompt: str | Conversation
    shown: Any
    expected: Reply
    written: str
    where: str


def find_questions(rows: Rows, columns: Columns, chat: ChatFormat, tools: Sequence[Any]) -> list[Question]:
    """The questions of rows with prompts and completions, or of messages: their last trained answers.

    Args:
        rows: rows without such an answer, and rows of texts, have no question.
        columns: of the rows.
        chat: the chat format, which writes the answers.
        tools: declarations of functions, for rows that have none.

    Raises:
        DataError: a row cannot be read, or the template does not print it in full.
    """
    questions = []
    for number, row in enumerate(rows.rows, start=1):
        where = rows.where(number)
        if columns.kind == "prompt/completion" and not chat.has_template:
            prompt, completion = (row[name] for name in columns.names)
            questions.append(Question(number, prompt, prompt, Reply(completion), completion, where))
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
            questions.append(Question(number, prompt, shown, expected, written, where))
    return questions


def answer_questions(
    questions: Sequence[Question],
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
    reply: Reply, question: Question, encoder: PromptEncoder, output: Output, adapter: str | None
) -> bool:
    """Whether an answer has the expected text and tool calls; compares raw texts if calls are unreadable."""
    expected = question.expected
    readable = encoder.format(adapter).read_reply(question.written, tools_of(question.prompt))
    if not readable.calls_like(expected):
        return encoder.raw(output).strip() == question.written.strip()
    return reply.calls_like(expected) and reply.content.split() == expected.content.split()
