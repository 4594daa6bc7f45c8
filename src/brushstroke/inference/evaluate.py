"""Evaluates a base on a data set, with one adapter, several, or none.

It does not define the metrics: see `scores` and `loss`.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

from brushstroke.adapter import Adapter
from brushstroke.base import Base, check_max_length, context_length, refuse_unknown_tokens, require_base
from brushstroke.data import (
    DataWarning,
    EncodedData,
    Example,
    Rows,
    Template,
    encode,
    find_columns,
    read_rows,
)
from brushstroke.errors import ConfigError, DataError
from brushstroke.inference.choices import Choices, find_labels, likeliest
from brushstroke.inference.generate import ONLY, PromptEncoder, open_bank
from brushstroke.inference.loss import Loss, loss_forward, total_loss
from brushstroke.inference.questions import Question, answer_questions, find_questions
from brushstroke.inference.request import SamplingParams, check_batch_size
from brushstroke.inference.scores import score
from brushstroke.layers import Bank

Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The scores of one adapter (or the base) on a data set.

    Args:
        rows: number of rows in the data.
        loss: nats per trained token; None if there is no trained token.
        trained_tokens: tokens whose prediction is in the loss.
        exact_match: share of answers that equal the expected text, see `Scores`.
        choice: share of rows whose expected answer is the label with the highest probability; None if the
            expected answers are no labels.
        contains: share of answers that contain the expected text, see `Scores`.
        final_answer: share of answers with the right text after "####", see `Scores`.
        rouge_l: ROUGE-L of the answers, see `Scores`.
        valid_json: share of answers that are one JSON object, see `Scores`.
        field_f1: F1 of the (key, value) pairs of the objects, see `Scores`.
        seconds: wall time.
        answers: for each answered row {row, prompt, expected, answer, adapter}; rows count from 1. With tool
            calls also {expected_calls, calls}, with reasoning {reasoning}, with labels {choice}.
    """

    rows: int
    loss: float | None
    trained_tokens: int
    exact_match: float | None
    choice: float | None
    contains: float | None
    final_answer: float | None
    rouge_l: float | None
    valid_json: float | None
    field_f1: float | None
    seconds: float
    answers: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The numbers, as JSON types."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("answers", "trained_tokens")
        }


@overload
def evaluate(base: Base, data: Any, adapters: Adapter | None = None, **options: Any) -> Evaluation: ...
@overload
def evaluate(
    base: Base, data: Any, adapters: Mapping[str, Adapter | None] | Bank, **options: Any
) -> dict[str, Evaluation]: ...
def evaluate(  # pyright: ignore[reportInconsistentOverload]  # `options` are the keyword arguments below
    base: Base,
    data: Any,
    adapters: Mapping[str, Adapter | None] | Bank | Adapter | None = None,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    generate: bool = True,
    choices: Choices = None,
    on_progress: Progress | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    max_length: int | None = None,
    split_turns: bool = False,
    tools: Sequence[Any] = (),
    chat_template: Template = None,
    date: str | None = None,
    allow_different_base: bool = False,
) -> Evaluation | dict[str, Evaluation]:
    """The loss on a data set, and the scores of the generated answers (greedy decoding).

    For a row of `messages`, the expected answer is the last assistant turn, and the prompt is everything
    before it. `text` and tokenised rows have only a loss.

    Args:
        base: the model and its tokenizer.
        data: any data that `read_rows` or `encode` accepts.
        adapters: one adapter; or several by name (None is the base), or a bank that is attached to the base:
            then the result is an evaluation for each name. Without it, the base is evaluated in its current
            state, with the adapter that is active in it.
        max_new_tokens: maximum number of tokens of an answer.
        batch_size: number of rows that are answered in one batch.
        generate: whether to generate answers; if not, only the loss is computed, and `choice` if `choices`
            says so.
        choices: labels, of which the most probable one is chosen; True takes all different expected answers,
            False none, and None takes them if they are few and repeated, see `find_labels`.
        on_progress: called with (name, "loss", "choices" or "answers", done, total).
        prompt_column: another name for `prompt`.
        completion_column: another name for `completion`.
        max_length: maximum example length in tokens for the loss; the model's context by default.
        split_turns: compute the loss of every assistant turn as a separate example, as in training.
        tools: declarations of functions, for rows that have none.
        chat_template: used instead of the template that the adapter was trained with.
        date: today's date for chat templates (YYYY-MM-DD); by default the day of the adapter's training.
        allow_different_base: use the adapter although its fingerprint belongs to another base.

    Raises:
        DataError: rows that cannot be read, or do not fit the model's context, or expect an answer that is
            not among the choices.
        BaseMismatchError, ShapeError: an adapter that does not fit the base.

    Warns:
        DataWarning: rows without an expected answer.
    """
    require_base(base)
    check_max_length(base.model, max_length)
    check_batch_size(batch_size)
    named = _by_name(adapters)
    sampling = SamplingParams(max_new_tokens)
    source = data
    if not (isinstance(data, Rows) or _is_tokenised(data)):
        source = read_rows(data, prompt=prompt_column, completion=completion_column)
    context = context_length(base.model)
    limit = min((n for n in (max_length, context) if n is not None), default=None)
    is_asked = generate or choices not in (None, False)
    seconds = dict.fromkeys(named, 0.0)
    encoded: dict[str, EncodedData] = {}
    questions: dict[str, list[Question]] = {}
    losses: dict[str, Loss] = {}
    chosen: dict[str, list[str | None]] = {}
    results: dict[str, Evaluation] = {}
    with open_bank(base, _trained(named, adapters), allow_different_base=allow_different_base) as bank:
        encoder = PromptEncoder(base, bank, chat_template, date) if base.tokenizer is not None else None
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
            if is_asked and encoder and isinstance(source, Rows):
                columns = find_columns(source, prompt_column, completion_column)
                questions[name] = find_questions(source, columns, encoder.format(adapter), tools)
        labels = _labels(questions, choices if is_asked else False)
        with loss_forward(base) as forward:
            for name, adapter in named.items():
                slot = None if bank is None else bank.slot(adapter)
                with _clock(seconds, name):
                    examples = encoded[name].examples
                    count = sum(1 for example in examples if example.trained)
                    done = _reporter(on_progress, name, "loss", count)
                    losses[name] = total_loss(forward, examples, slot, done)
                    if labels and encoder:
                        chat, asked = encoder.format(adapter), questions[name]
                        done = _reporter(on_progress, name, "choices", len(asked))
                        chosen[name] = likeliest(
                            forward, chat, asked, labels, slot, max_length=context, on_done=done
                        )
        for name, adapter in named.items():
            asked = questions.get(name, [])
            answers: list[dict[str, Any]] = []
            right: list[bool] = []
            if generate and encoder:
                done = _reporter(on_progress, name, "answers", len(asked))
                with _clock(seconds, name):
                    answers, right = answer_questions(asked, encoder, adapter, sampling, batch_size, done)
            if is_asked and 0 < len(asked) < len(source):
                lacking = f"{len(source) - len(asked)} of {len(source)} rows have no expected answer"
                warnings.warn(f"{lacking}; only their loss counts", DataWarning, stacklevel=2)
            choice = _share_chosen(asked, chosen.get(name, ()), answers)
            results[name] = _evaluation(encoded[name], losses[name], answers, right, choice, seconds[name])
    return results[ONLY] if adapters is None or isinstance(adapters, Adapter) else results


def _by_name(adapters: Mapping[str, Adapter | None] | Bank | Adapter | None) -> dict[str, str | None]:
    """The names of the evaluations, and the name of the adapter of each; None is the base.

    Raises:
        ConfigError: there are none, or the type is wrong.
    """
    if adapters is None:
        return {ONLY: None}
    if isinstance(adapters, Adapter):
        return {ONLY: ONLY}
    if isinstance(adapters, Bank):
        return {name: name for name in adapters.names}
    if not isinstance(adapters, Mapping):
        raise ConfigError(
            f"adapters must be an Adapter, a dict of adapters by name, or a Bank; got "
            f"{type(adapters).__name__}: load a folder with load(folder)"
        )
    if not adapters:
        raise ConfigError(
            "no adapters given, so there is nothing to evaluate; give at least one name (None as its adapter "
            "is the base)"
        )
    return {name: name if adapter is not None else None for name, adapter in adapters.items()}


def _trained(named: Mapping[str, str | None], adapters: Any) -> Any:
    """The adapters without names of the base."""
    if not isinstance(adapters, Mapping) or isinstance(adapters, Adapter):
        return adapters
    return {name: adapters[name] for name, adapter in named.items() if adapter is not None}


def _labels(questions: Mapping[str, Sequence[Question]], choices: Choices) -> tuple[str, ...]:
    """The labels of all adapters; see `find_labels`.

    Raises:
        DataError: a row expects an answer that is not among the choices, calls a tool or reasons.
    """
    asked = next(iter(questions.values()), [])
    if any(question.expected.tool_calls or question.expected.reasoning for question in asked):
        if choices in (None, False):
            return ()
        raise DataError(
            "answers that call a tool, or reason first, cannot be chosen among labels; leave the choices out"
        )
    labels = find_labels([question.expected.content for question in asked], choices)
    for question in asked if labels else ():
        if question.expected.content not in labels:
            raise DataError(
                f"{question.where}: the expected answer {question.expected.content!r} is not among the "
                f"{len(labels)} choices; add it, or take all expected answers (choices=True, --choices all)"
            )
    return labels


def _share_chosen(
    asked: Sequence[Question], chosen: Sequence[str | None], answers: Sequence[dict[str, Any]]
) -> float | None:
    """The share of rows whose expected label was chosen; the records of the answers get the labels."""
    if not chosen:
        return None
    for record, label in zip(answers, chosen, strict=False):
        record["choice"] = label
    right = sum(label == q.expected.content for q, label in zip(asked, chosen, strict=True))
    return right / len(chosen)


def _evaluation(
    data: EncodedData,
    loss: Loss,
    answers: Sequence[dict[str, Any]],
    right: Sequence[bool],
    choice: float | None,
    seconds: float,
) -> Evaluation:
    texts = [record for record in answers if not record.get("expected_calls")]
    # an answer that calls a tool where a text was expected is wrong
    pairs = [("" if record.get("calls") else record["answer"], record["expected"]) for record in texts]
    scores = score(pairs, right, are_labels=choice is not None)
    return Evaluation(
        rows=data.report.rows,
        loss=loss.mean,
        trained_tokens=loss.trained_tokens,
        choice=choice,
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


def _reporter(on_progress: Progress | None, name: str, what: str, count: int) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress(name, what, done, count)


def _is_tokenised(data: Any) -> bool:
    if isinstance(data, EncodedData):
        return True
    return isinstance(data, Sequence) and bool(data) and isinstance(data[0], Example)
