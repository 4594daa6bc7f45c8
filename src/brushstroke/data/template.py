"""One chat template: renders conversations, fixes the date, and adapts the generation prompt.

It does not check the text; `layout` does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import takewhile
from typing import Any

from brushstroke.errors import ConfigError, DataError

_PIECES = re.compile(r"<[^<>\s]*>|\s+|[^\s<]+|<")
_LAST_TAG = re.compile(r"<([^<>/\s]+)>\Z")


class TemplateRefusal(DataError):
    """A template raised an error for a conversation, or failed."""


class ChatTemplate:
    """A Jinja chat template of a tokenizer.

    Args:
        tokenizer: a tokenizer of transformers, which renders.
        source: the template text.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.reads_think_tags: bool | None = None  # cached results of tests of the template
        self.repeated_header: str | None = None
        self.openings: dict[Any, str] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        ask: bool = False,
    ) -> str:
        """Render a conversation; with `ask`, add the generation prompt.

        Raises:
            TemplateRefusal: the template raises an error.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                chat_template=self.source,
                add_generation_prompt=ask,
                tokenize=False,
                **(options or {}),
            )
        except Exception as error:  # a template is a program by another author
            raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error


def read_date(text: str) -> date:
    """Read a date in the form YYYY-MM-DD.

    Raises:
        ConfigError: it is none.
    """
    try:
        return date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(f"the date is {text!r}; expected YYYY-MM-DD, such as 2026-01-31") from None


def with_date(source: str, today: str | None = None) -> str:
    """A template with a fixed date instead of the day of rendering.

    Args:
        source: the template text.
        today: the date, as YYYY-MM-DD; None keeps a date that is already fixed, or takes today's.

    Raises:
        ConfigError: it is not a date.
    """
    day = read_date(today) if today is not None else date.today()
    filters = "".join(
        f" | replace({json.dumps(way)}, {json.dumps(day.strftime(way))})" for way in _DIRECTIVES
    )
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"
    if _DATED.search(source):
        return source if today is None else _DATED.sub(lambda _: macro, source)
    return macro + source if "strftime_now" in source else source


_DIRECTIVES = tuple(
    f"%{sign}{letter}" for sign in ("-", "") for letter in "aAbBcCdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
)
_DATED = re.compile(r"\{% macro strftime_now\(format\) %\}\{\{[^{}]*\}\}\{% endmacro %\}\n")


def date_of(source: str) -> str | None:
    """The date that `with_date` fixed in a template, as YYYY-MM-DD; None if it prints no date."""
    found = _DATED.search(source)
    day = found and re.search(r'replace\("%F", "([^"]*)"\)', found[0])
    return day[1] if day else None


def with_other_end(source: str, end: str, other: str) -> str:
    """A template with another end of its generation prompt."""
    body = source[:-1] if source.endswith("\n") else source  # Jinja removes it at the end
    old, new = (json.dumps(text, ensure_ascii=False) for text in (end, other))
    asks = f"add_generation_prompt and rendered.endswith({old})"
    cut = f"rendered.removesuffix({old}) ~ {new} if {asks} else rendered"
    return f"{{% set rendered %}}\n{body}{{% endset %}}{{{{ {cut} }}}}"


def common_start(one: str, other: str) -> str:
    """The common prefix of two texts, in whole words and markers such as <|assistant|>."""
    if other.startswith(one):
        return one
    pairs = zip(_PIECES.findall(one), _PIECES.findall(other), strict=False)
    return "".join(piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_end(one: str, other: str) -> str:
    """The common suffix of two texts."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def common_opening(asked: str, answered: str, before: int, content: int) -> int:
    """The length of the common prefix of a prompt and an answered conversation; 0 if values differ.

    A last marker that is closed before the content (<think> by </think>) belongs to the answer.

    Args:
        asked: the generation prompt.
        answered: the conversation with its answer.
        before: the end of the last value before the answer.
        content: the beginning of the answer's content.
    """
    if answered.startswith(asked):
        return len(asked)
    if asked[:before] != answered[:before]:
        return 0
    common = asked[:before] + common_start(asked[before:], answered[before:content])
    return len(without_open_tag(common, answered[:content]))


def without_open_tag(common: str, answered: str) -> str:
    """A prefix of a text, without tags at its end that the text closes later."""
    while (tag := _LAST_TAG.search(common)) and f"</{tag[1]}>" in answered[len(common) :]:
        common = common[: tag.start()]
    return common


def last_marker(closing: str, answer: str, known: Sequence[str], *, is_text: bool) -> tuple[int, str] | None:
    """The end marker of an answer, the last marker in `closing`, as (its end position, its text).

    A marker that closes a tag of the answer, such as </tool_call>, does not end it.

    Args:
        closing: the template's text after an answer.
        answer: the answer up to there.
        known: the tokenizer's special and other added tokens.
        is_text: whether the answer ends with its content, so that any words after it end the answer.
    """
    places = [
        (closing.rfind(token) + len(token), token) for token in known if token.strip() and token in closing
    ]
    places += [(match.end(), match[0]) for match in _MARKER.finditer(closing)]
    places = [place for place in places if not _closes(place[1], answer)]
    if places:
        return max(places, key=lambda place: (place[0], len(place[1])))
    stripped = closing.strip()
    return (closing.index(stripped) + len(stripped), stripped) if stripped and is_text else None


_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def words_after_marker(closing: str, known: Sequence[str]) -> str:
    """The words after the first marker in the end of a text; "" if there are none.

    Args:
        closing: the end of the text.
        known: the tokenizer's special and other added tokens.
    """
    known = [marker for marker in known if marker in closing]
    first = min((closing.index(marker) + len(marker) for marker in known), default=len(closing))
    text = closing[first:]
    for marker in known:
        text = text.replace(marker, "")
    return " ".join(re.findall(r"[^\W\d_]{2,}", re.sub(r"<[^<>\s]*>", "", text)))


def _closes(marker: str, answer: str) -> bool:
    """Whether a marker closes a tag that an answer opened."""
    return marker.startswith("</") and re.search(rf"<{re.escape(marker[2:-1])}[\s>=/]", answer) is not None
