"""One chat template: conversations as text, on a date that stays, and questions as answers were trained.

It does not judge what it prints: `layout` does.
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
    """A template that raises an error for a conversation, or fails."""


class ChatTemplate:
    """A Jinja chat template of a tokenizer.

    Args:
        tokenizer: of transformers; it renders.
        source: the template.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.tokenizer, self.source = tokenizer, source
        self.reads_think_tags: bool | None = None  # what was found of it, once it has been tried
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
        """The text of a conversation; with `ask`, up to where the next answer begins.

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
        except Exception as error:  # a template is a program that somebody else wrote
            raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error


def read_date(text: str) -> date:
    """A date from YYYY-MM-DD.

    Raises:
        ConfigError: it is none.
    """
    try:
        return date.fromisoformat(text)
    except (TypeError, ValueError):
        raise ConfigError(f"the date is {text!r}; expected YYYY-MM-DD, such as 2026-01-31") from None


def with_date(source: str, today: str | None = None) -> str:
    """A template that prints the same, with a date in place of the day on which it is rendered.

    Args:
        source: the template.
        today: the date, as YYYY-MM-DD; None keeps the date that the template has already, and takes today's
            where it has none.

    Raises:
        ConfigError: this is no date.
    """
    day = read_date(today) if today is not None else date.today()
    told = "".join(f" | replace({json.dumps(way)}, {json.dumps(day.strftime(way))})" for way in _DIRECTIVES)
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n"
    if _DATED.search(source):
        return source if today is None else _DATED.sub(lambda _: macro, source)
    return macro + source if "strftime_now" in source else source


_DIRECTIVES = tuple(
    f"%{sign}{letter}" for sign in ("-", "") for letter in "aAbBcCdDeFgGhHIjklmMpPrRsSTuUVwWxXyYzZ"
)
_DATED = re.compile(r"\{% macro strftime_now\(format\) %\}\{\{[^{}]*\}\}\{% endmacro %\}\n")


def date_of(source: str) -> str | None:
    """The date that `with_date` put into a template, as YYYY-MM-DD; None where it prints none."""
    found = _DATED.search(source)
    day = found and re.search(r'replace\("%F", "([^"]*)"\)', found[0])
    return day[1] if day else None


def with_other_end(source: str, end: str, other: str) -> str:
    """A template that prints the same, but for the end of its generation prompt."""
    body = source[:-1] if source.endswith("\n") else source  # Jinja itself drops it at the end
    old, new = (json.dumps(text, ensure_ascii=False) for text in (end, other))
    asks = f"add_generation_prompt and rendered.endswith({old})"
    cut = f"rendered.removesuffix({old}) ~ {new} if {asks} else rendered"
    return f"{{% set rendered %}}\n{body}{{% endset %}}{{{{ {cut} }}}}"


def common_start(one: str, other: str) -> str:
    """What two texts begin with, in whole words and markers such as <|assistant|>."""
    if other.startswith(one):
        return one
    pairs = zip(_PIECES.findall(one), _PIECES.findall(other), strict=False)
    return "".join(piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_end(one: str, other: str) -> str:
    """What two texts end with."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def common_opening(asked: str, answered: str, before: int, content: int) -> int:
    """How much of a generation prompt an answered conversation begins with; 0 where values before it differ.

    A last marker that is closed before the content, as </think> closes <think>, belongs to the answer.

    Args:
        asked: the generation prompt.
        answered: the conversation with its answer.
        before: where the last value before the answer ends.
        content: where the content of the answer begins.
    """
    if answered.startswith(asked):
        return len(asked)
    if asked[:before] != answered[:before]:
        return 0
    common = asked[:before] + common_start(asked[before:], answered[before:content])
    return len(without_open_tag(common, answered[:content]))


def without_open_tag(common: str, answered: str) -> str:
    """A beginning of a text, without tags at its end that the text closes further on."""
    while (tag := _LAST_TAG.search(common)) and f"</{tag[1]}>" in answered[len(common) :]:
        common = common[: tag.start()]
    return common


def last_marker(closing: str, answer: str, known: Sequence[str], *, is_text: bool) -> tuple[int, str] | None:
    """What ends an answer, as (where it ends in `closing`, the text): the last marker there.

    A marker such as </tool_call> that closes what the answer opened does not end it.

    Args:
        closing: what a template writes behind an answer.
        answer: all of the answer up to there.
        known: the tokenizer's special and other added tokens.
        is_text: whether the answer ends with its content, so that any words behind it end the answer.
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


def words_behind_marker(closing: str, known: Sequence[str]) -> str:
    """Words that stand behind the first marker of an end of a text; "" for none.

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
    """Whether a marker is the end of a tag that an answer opened."""
    return marker.startswith("</") and re.search(rf"<{re.escape(marker[2:-1])}[\s>=/]", answer) is not None
