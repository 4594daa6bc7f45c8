"""Scores of answers against the expected texts: exact match, contained text, final answer, ROUGE-L, JSON.

It runs no model.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib.util import find_spec
from typing import Any, NoReturn

_NUMBER = re.compile(r"(?P<sign>[-+]?)\$?(?P<digits>(\d{1,3}(,\d{3})+|\d+)(\.\d+)?)")
_WORD = re.compile(r"[^\W_]+")
_FINAL = "####"  # before the final answer, as in gsm8k


@dataclass(frozen=True)
class Scores:
    """Shares from 0 to 1; None if a score is not defined.

    Args:
        exact_match: share of answers that equal their gold text, both stripped; if both are one JSON object,
            equal objects are enough. An answer with tool calls must have the same calls (names, and arguments
            as JSON values). None without gold texts and calls.
        contains: share of answers that contain their gold text, both in lower case and with single spaces.
            None if a gold text is a JSON object or empty.
        final_answer: share of answers whose line after the last "####" equals that of the gold text, as a
            number (without separators of thousands) or else as text. None unless every gold text has one.
        rouge_l: the mean F1 of the longest common subsequence of words, from the library rouge-score. Words
            are runs of letters and digits of any script in lower case; its own words are only those of
            ASCII. None if a gold text is a JSON object, has no word or ends in "####", if the gold texts are
            labels, or if the library is not installed.
        valid_json: share of answers that are exactly one JSON object, among the rows whose gold text is one.
            None if no gold text is one.
        field_f1: micro-averaged over the (key, value) pairs of the objects of those rows,
            2·common / (answered + gold). Values are compared as canonical JSON, in which 1.0 equals 1; an
            invalid answer has no pairs.
    """

    exact_match: float | None
    contains: float | None
    final_answer: float | None
    rouge_l: float | None
    valid_json: float | None
    field_f1: float | None


def score(
    pairs: Iterable[tuple[str, str]], calls: Sequence[bool] = (), *, are_labels: bool = False
) -> Scores:
    """The scores of (answer, gold) pairs.

    Args:
        pairs: answers and gold texts.
        calls: for other answers, whether their tool calls are right.
        are_labels: whether the gold texts are labels, so that there is no ROUGE-L.

    >>> score([('{"a": 1}', '{"a":1}'), ('Sure! {"a": 1}', '{"a": 1, "b": 2}')])
    Scores(exact_match=0.5, contains=None, final_answer=None, rouge_l=None, valid_json=0.5, field_f1=0.5)
    """
    given = list(pairs)
    exact = valid = objects = common = fields = 0
    for answer, gold in given:
        expected, got = json_object(gold), json_object(answer)
        exact += answer.strip() == gold.strip() or (expected is not None and _pairs(expected) == _pairs(got))
        if expected is not None:
            objects += 1
            valid += got is not None
            wanted, found = _pairs(expected) or set(), _pairs(got) or set()
            common += len(wanted & found)
            fields += len(wanted) + len(found)
    golds = [gold for _, gold in given]
    texts = [(_plain(answer), _plain(gold)) for answer, gold in given]
    finals = [(_final_answer(answer), _final_answer(gold)) for answer, gold in given]
    is_contained = bool(given) and not objects and all(gold for _, gold in texts)
    has_finals = bool(given) and all(_FINAL in gold for gold in golds)
    return Scores(
        contains=sum(gold in answer for answer, gold in texts) / len(texts) if is_contained else None,
        final_answer=sum(a == b for a, b in finals) / len(finals) if has_finals else None,
        rouge_l=_rouge_l(given) if is_contained and not (has_finals or are_labels) else None,
        exact_match=(exact + sum(calls)) / (len(given) + len(calls)) if given or calls else None,
        valid_json=valid / objects if objects else None,
        field_f1=(2 * common / fields if fields else 1.0) if objects else None,
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


class _Words:
    """The words of a text, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def _rouge_l(pairs: Sequence[tuple[str, str]]) -> float | None:
    words = _Words()
    if find_spec("rouge_score") is None or not all(words.tokenize(gold) for _, gold in pairs):
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=words)
    return sum(scorer.score(gold, answer)["rougeL"].fmeasure for answer, gold in pairs) / len(pairs)


def _final_answer(text: str) -> Any:
    """What follows the last "####", as a number if it is one; None if there is none."""
    _, mark, final = text.rpartition(_FINAL)
    if not mark:
        return None
    final = next(iter(final.strip().splitlines()), "").strip()
    found = _NUMBER.fullmatch(final)
    return Decimal(found["sign"] + found["digits"].replace(",", "")) if found else final


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a text, if the whole text (stripped) is one object; otherwise None.

    >>> json_object(' {"a": [1]} '), json_object('{"a": 1} done'), json_object("[1]")
    ({'a': [1]}, None, None)
    """
    try:
        parsed = json.loads(text.strip(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _pairs(parsed: dict[str, Any] | None) -> set[tuple[str, str]] | None:
    if parsed is None:
        return None
    return {
        (key, json.dumps(_numbers(value), sort_keys=True, ensure_ascii=False, separators=(",", ":")))
        for key, value in parsed.items()
    }


def _numbers(value: Any) -> Any:
    """The value with integral floats as integers, at any depth."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")
