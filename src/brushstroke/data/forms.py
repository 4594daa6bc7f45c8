"""The forms in which a conversation can be passed to a chat template, the most likely first.

Templates differ in their input: contents as text or as parts, arguments as an object or as JSON text,
reasoning under three names. `layout` finds the right form by rendering; this module only writes the forms.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from brushstroke.data.messages import REASONING, SPLIT, Conversation
from brushstroke.data.validate import Message

DEVELOPER_AS_SYSTEM = (
    "developer messages are written as system messages: the chat template has no developer role"
)
THOUGHTS_SPLIT = (
    "<think>…</think> at the beginning of answers is passed to the chat template as their reasoning"
)


INLINE = "inline"
THOUGHT = "<think>\n{}\n</think>\n\n{}"


@dataclass(frozen=True)
class Form:
    """A form in which a conversation is written for a template.

    Args:
        thoughts: pass a leading <think>…</think> as reasoning: "tagged" only if the template writes it
            between the same tags, "any" in all cases; "" leaves it in the content.
        parts: contents as a list with one text part instead of a text.
        reasoning: the key of the reasoning; INLINE writes it between <think> tags at the beginning of the
            content.
        arguments_as_text: arguments of tool calls as JSON text instead of an object.
        no_content: the content of an answer without content: "", None, or no such key (...).
        developer_as_system: developer messages as system messages.
        wrapped_tools: declarations as {"type": "function", "function": {...}}.
        blank_reasoning: give answers without reasoning an empty one, so that the template does not search the
            content for it.
    """

    thoughts: str = ""
    parts: bool = False
    reasoning: str = REASONING[0]
    arguments_as_text: bool = False
    no_content: Any = ""
    developer_as_system: bool = False
    wrapped_tools: bool = False
    blank_reasoning: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about this form for people."""
        developer = (DEVELOPER_AS_SYSTEM,) if self.developer_as_system else ()
        return developer + ((THOUGHTS_SPLIT,) if self.thoughts else ())

    def messages(self, messages: tuple[Message, ...]) -> list[dict[str, Any]]:
        """The messages in this form."""
        return [self._message(message) for message in messages]

    def tools(self, tools: tuple[Any, ...]) -> list[Any] | None:
        """The tool declarations in this form; None if there are none."""
        if not tools:
            return None
        return [
            {"type": "function", "function": t} if self.wrapped_tools and "function" not in t else t
            for t in tools
        ]

    def _message(self, message: Message) -> dict[str, Any]:
        made = dict(message)
        was_in_content = made.pop(SPLIT, False)
        key = self.reasoning
        if key == INLINE and self.thoughts and not was_in_content:
            key = REASONING[0]
        if self.blank_reasoning and made["role"] == "assistant":
            made.setdefault("reasoning_content", "")
        if key == INLINE and ("reasoning_content" in made or was_in_content):
            made["content"] = THOUGHT.format(made.pop("reasoning_content", ""), made.get("content", ""))
        if self.developer_as_system and made["role"] == "developer":
            made["role"] = "system"
        if "content" in made and self.parts:
            made["content"] = [{"type": "text", "text": made["content"]}]
        if (
            not made.get("content")
            and made["role"] == "assistant"
            and made.keys() & {"tool_calls", "reasoning_content"}
        ):
            made.pop("content", None)
            if self.no_content is not ...:
                made["content"] = self.no_content
        if "reasoning_content" in made:
            made[key] = made.pop("reasoning_content")
        if "tool_calls" in made and self.arguments_as_text:
            made["tool_calls"] = [_with_text(call) for call in made["tool_calls"]]
        return made


def forms(conversation: Conversation) -> Iterator[tuple[Form, Conversation]]:
    """All forms that differ for a conversation, each with the conversation that it writes."""
    split = conversation.with_thoughts_split()
    for thoughts, keys in (
        ("tagged", REASONING),
        ("", (*REASONING, INLINE)),
        ("tagged", (INLINE,)),
        ("any", REASONING),
    ):
        changed = split if thoughts else conversation
        if changed is None:
            continue
        messages = changed.messages
        answers = [message for message in messages if message["role"] == "assistant"]
        calls = any("tool_calls" in message for message in answers)
        empty = any(not m.get("content") and m.keys() & {"tool_calls", "reasoning_content"} for m in answers)
        reasons = any(message.keys() & {"reasoning_content", SPLIT} for message in answers)
        closes = any("</think>" in message.get("content", "") for message in answers)
        bare = any("function" not in tool for tool in changed.tools)
        for choice in product(
            (False, True),
            (False, True) if any(message["role"] == "developer" for message in messages) else (False,),
            keys if reasons else keys[:1],
            (False, True) if calls else (False,),
            ("", None, ...) if empty else ("",),
            (False, True) if bare else (False,),
            (False, True) if closes else (False,),
        ):
            parts, developer, reasoning, as_text, no_content, wrapped, blank = choice
            yield Form(thoughts, parts, reasoning, as_text, no_content, developer, wrapped, blank), changed


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
