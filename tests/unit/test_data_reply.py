"""Parsing of answers in the chat template's format: reasoning, content and calls."""

import json

import data_tokenizers as have
import pytest

from brushstroke.data import ChatFormat
from brushstroke.data.reply import Reply

OPENING = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
THOUGHT = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
ENDING = (
    "<|im_end|>\n{% endfor %}{{ tools | tojson if tools }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A JSON object of name and arguments, as Hermes and Qwen write calls.
AS_JSON = (
    OPENING
    + THOUGHT
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    + "\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    + ENDING
)
# Pairs of tags, in which texts are written as they are.
AS_TAGS = (
    OPENING
    + THOUGHT
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}\n<call={{ c.function.name }}>"
    + "{% for k, v in c.function.arguments.items() %}\n<arg={{ k }}>\n"
    + "{{ v if v is string else v | tojson }}\n</arg>{% endfor %}\n</call>{% endfor %}"
    + ENDING
)
# The content behind the calls.
CONTENT_LAST = (
    OPENING
    + "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    + "{{ m.content or '' }}"
    + ENDING
)
# Calls in place of a content.
CALLS_ALONE = (
    OPENING
    + "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    + "[{{ c.function.name }}]{{ c.function.arguments | tojson }}{% endfor %}"
    + "{% else %}{{ m.content }}{% endif %}"
    + ENDING
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "tide",
            "parameters": {
                "type": "object",
                "properties": {
                    "harbour": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "marks": {"type": "array"},
                    "code": {"type": "string"},
                },
            },
        },
    }
]
ARGUMENTS = [
    {"harbour": "Brest"},
    {"harbour": 'a "quoted" one', "days": 3},
    {"harbour": "two\nlines, a <b> and a {c}", "exact": False},
    {"marks": ["high", 2, None], "days": -1},
    {"code": "12", "days": 12},
]


def chat(template):
    return ChatFormat(have.byte_level(template))


def written(template, message):
    """An answer as plain transformers prints it, without its header and its end."""
    tokenizer = have.byte_level(template)
    question = {"role": "user", "content": "?"}
    whole = tokenizer.apply_chat_template([question, message], tokenize=False)
    return whole.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]


def answer(*calls, content="", **fields):
    made = [{"type": "function", "function": {"name": "tide", "arguments": given}} for given in calls]
    return {"role": "assistant", "content": content, **({"tool_calls": made} if made else {}), **fields}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=json.dumps)
@pytest.mark.parametrize("template", [AS_JSON, AS_TAGS, CALLS_ALONE], ids=["json", "tags", "alone"])
def test_calls_are_read_as_they_were_written(template, arguments):
    read = chat(template).read_reply(written(template, answer(arguments)), TOOLS)
    assert [dict(call) for call in read.tool_calls] == [{"name": "tide", "arguments": arguments}]


@pytest.mark.parametrize("template", [AS_JSON, AS_TAGS], ids=["json", "tags"])
def test_all_parts_of_an_answer_are_parsed(template):
    given = answer({"harbour": "Brest"}, {"harbour": "Roscoff"}, content="I look.", reasoning_content="Two.")
    read = chat(template).read_reply(written(template, given), TOOLS)
    assert (read.content.strip(), read.reasoning) == ("I look.", "Two.")
    assert [call["arguments"]["harbour"] for call in read.tool_calls] == ["Brest", "Roscoff"]


def test_content_after_tool_calls_is_kept():
    given = answer({"harbour": "Brest"}, {"harbour": "Roscoff"}, content="I look.")
    read = chat(CONTENT_LAST).read_reply(written(CONTENT_LAST, given), TOOLS)
    assert (read.content, len(read.tool_calls)) == ("I look.", 2)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("Nine.", "Nine.", ""),
        ("<think>\nWhy.\n</think>\n\nNine.", "Nine.", "Why."),
        ("<think>Why.</think>Nine.", "Nine.", "Why."),
        ("<think>\nWhy, and it never en", "", "Why, and it never en"),
        ("a <think> in the middle", "a <think> in the middle", ""),
    ],
)
def test_answers_without_calls(text, content, reasoning):
    assert chat(AS_JSON).read_reply(text) == Reply(content, reasoning)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "tide", "arguments": {"harbour": "Bre',
        '<tool_call>\n{"name": "tide", "arguments": "Brest"}\n</tool_call>',
        "<tool_call>\nBrest\n</tool_call>",
    ],
)
def test_incomplete_call_is_text(text):
    read = chat(AS_JSON).read_reply(text, TOOLS)
    assert read.tool_calls == ()
    assert read.content.strip() == text


def test_value_containing_template_text_is_not_parsed():
    text = written(AS_TAGS, answer({"harbour": "Brest\n<call=tide>\n<arg=days>\n3\n</arg>\n</call>"}))
    assert chat(AS_TAGS).read_reply(text, TOOLS).tool_calls == ()


def test_declaration_decides_whether_an_argument_is_text_or_number():
    one, other = (answer({"code": value}) for value in ("12", 12))
    typed, untyped = chat(AS_JSON), chat(AS_TAGS)
    assert not typed.read_reply(written(AS_JSON, one)).calls_like(typed.read_reply(written(AS_JSON, other)))
    assert untyped.read_reply(written(AS_TAGS, one)).calls_like(untyped.read_reply(written(AS_TAGS, other)))


def test_calls_differ_by_name_and_by_value_and_not_by_order_of_arguments():
    read = [
        chat(AS_JSON).read_reply(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
        for name, arguments in (
            ("tide", '{"a": 1, "b": [2]}'),
            ("tide", '{"b": [2], "a": 1}'),
            ("tide", '{"a": 1, "b": [3]}'),
            ("wind", '{"a": 1, "b": [2]}'),
        )
    ]
    assert [read[0].calls_like(other) for other in read] == [True, True, False, False]


def test_answer_without_template_is_plain_text():
    tokenizer = have.byte_level(AS_JSON)
    tokenizer.chat_template = None
    assert ChatFormat(tokenizer).read_reply("<think>a</think>b") == Reply("<think>a</think>b")


# The id of a call stands beside its name, as Mistral writes it.
WITH_IDS = (
    OPENING
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    + "[CALLS]{{ c.function.name }}[ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    + ENDING
)


def test_call_ids_are_ignored():
    (call,) = (
        chat(WITH_IDS).read_reply('[CALLS]tide[ID]zZ9-abcde[ARGS]{"harbour": "Brest"}', TOOLS).tool_calls
    )
    assert call == {"name": "tide", "arguments": {"harbour": "Brest"}}


@pytest.mark.parametrize("template", [AS_JSON, AS_TAGS], ids=["json", "tags"])
@pytest.mark.parametrize("calls", [({},), ({}, {"harbour": "Brest"}), ({"harbour": "Brest"}, {}), ({}, {})])
def test_calls_without_arguments(template, calls):
    read = chat(template).read_reply(written(template, answer(*calls)), TOOLS)
    assert [call["arguments"] for call in read.tool_calls] == list(calls)
