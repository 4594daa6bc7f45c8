"""A row is written in the first form that its template prints in full, or refused with the reason."""

import data_tokenizers as have
import pytest

from brushstroke.data import ChatFormat, encode, segments
from brushstroke.data.json_values import as_json, read_options, read_tools, without_nulls
from brushstroke.errors import DataError

QUESTION = {"role": "user", "content": "What time is it?"}
ANSWER = {"role": "assistant", "content": "It is noon."}
ENDED = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPENED = "{% for m in messages %}<|im_start|>{{ m.role }}\n"


def trained(template, messages, **row):
    """The trained texts of every example, and that each is asked with what stands before it."""
    tokenizer = have.byte_level(template)
    data = encode([{"messages": messages, **row}], tokenizer)
    return [
        tokenizer.decode(example.tokens[start:stop])
        for example in data
        for start, stop, learnt in segments(example)
        if learnt
    ]


def refused(template, messages, *fragments, **row):
    with pytest.raises(DataError) as caught:
        encode([{"messages": messages, **row}], have.byte_level(template))
    for fragment in ("row 1", *fragments):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("thought", ["", " \n"])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_blank_reasoning_is_dropped(thought, name):
    template = OPENED + "{{ m.content }}" + ENDED
    assert trained(template, [QUESTION, ANSWER | {name: thought}]) == ["It is noon.<|im_end|>"]


def test_blank_message_is_refused_if_the_template_ignores_contents():
    template = OPENED.replace("messages", "messages if m.role != 'system'") + "{{ m.content }}" + ENDED
    for content in ("", " "):
        messages = [{"role": "system", "content": content}, QUESTION, ANSWER]
        refused(template, messages, "does not print the content of message 1 (system)")
    assert trained(template, [QUESTION, ANSWER]) == ["It is noon.<|im_end|>"]


def test_template_with_constant_header_ends_prompts_after_the_header():
    """A header after every turn, whoever speaks next, as where `add_generation_prompt` is not read."""
    header = "{% if m.role == 'user' %}<|assistant|>{% endif %}"
    template = "{% for m in messages %}{{ m.content }}<|im_end|>" + header + "{% endfor %}"
    assert trained(template, [QUESTION, ANSWER]) == ["It is noon.<|im_end|>"]
    chat = ChatFormat(have.byte_level(template))
    assert chat.tokenizer.decode(chat.prompt_tokens([QUESTION])) == "What time is it?<|im_end|><|assistant|>"


def test_header_repeated_after_every_answer_is_not_trained():
    template = "{% for m in messages %}{{ m.content }}<|im_end|><|assistant|>{% endfor %}"
    tokenizer = have.byte_level(template)
    assert trained(template, [QUESTION, ANSWER]) == ["It is noon.<|im_end|>"]
    assert ChatFormat(tokenizer).stop_texts == ("<|im_end|>",)


def test_header_missing_in_prompts_belongs_to_the_answer():
    """The template alone writes it, together with the answer: a model that is asked has to write it too."""
    template = OPENED + "{{ m.content }}<|im_end|>\n{% endfor %}"
    assert trained(template, [QUESTION, ANSWER]) == ["<|im_start|>assistant\nIt is noon.<|im_end|>"]
    chat = ChatFormat(have.byte_level(template))
    prompt = chat.tokenizer.decode(chat.prompt_tokens([QUESTION]))
    assert prompt == "<|im_start|>user\nWhat time is it?<|im_end|>\n"
    assert chat.read_reply("<|im_start|>assistant\nIt is noon.").content == "It is noon."


def test_prompt_without_line_end_equals_the_trained_prompt():
    """Between a question and the header of its answer a line end stands only if the answer is there too."""
    template = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{% if not loop.last %}\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    assert trained(template, [QUESTION, ANSWER]) == ["It is noon.<|im_end|>"]
    chat = ChatFormat(have.byte_level(template))
    prompt = chat.tokenizer.decode(chat.prompt_tokens([QUESTION]))
    assert prompt == "### user:\nWhat time is it?\n### assistant:\n"


def test_answer_after_tool_result_uses_the_trained_prompt():
    """The template opens a turn when it asks, and not where it writes what follows the result of a tool."""
    template = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}"
        "{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
        "{% elif m.tool_calls %}[{{ m.tool_calls[0].function | tojson }}]"
        "{% else %}{{ m.content }}{{ '<|im_end|>' if m.role == 'assistant' else '' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'user' %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    messages = [QUESTION, called, {"role": "tool", "name": "clock", "content": "12:00"}, ANSWER]
    tools = [{"type": "function", "function": {"name": "clock"}}]
    assert trained(template, messages, tools=tools)[1] == "It is noon.<|im_end|>"
    chat = ChatFormat(have.byte_level(template))
    asked = chat.tokenizer.decode(chat.prompt_tokens(messages[:3], tools=tools))
    assert asked.endswith("12:00")


def test_text_after_every_conversation_is_never_trained():
    behind = "{% endfor %}<|begin|>Answer in one word.<|im_end|>"
    template = OPENED + "{{ m.content }}" + ENDED.replace("{% endfor %}", behind)
    refused(template, [QUESTION, ANSWER], "'Answer in one word' after every conversation")


def test_template_that_inspects_values_is_outlined_with_values():
    template = OPENED + "{% if 'noon' in m.content %}<|begin|>{% endif %}{{ m.content }}" + ENDED
    assert trained(template, [QUESTION, ANSWER]) == ["<|begin|>It is noon.<|im_end|>"]
    assert trained(template, [QUESTION, ANSWER | {"content": "Late."}]) == ["Late.<|im_end|>"]


@pytest.mark.parametrize(
    "change", ["| upper", "| replace('noon', 'midnight')", "[:5]", "| first", "| length", "| string | list"]
)
def test_a_template_that_changes_a_content_is_refused(change):
    refused(OPENED + "{{ m.content " + change + " }}" + ENDED, [QUESTION, ANSWER], "cannot write this row")


def test_stripped_white_space_is_reported():
    tokenizer = have.byte_level(OPENED + "{{ m.content | trim }}" + ENDED)
    spaced = [QUESTION, ANSWER | {"content": "  It is noon.\n"}]
    assert any("white space" in note for note in encode([{"messages": spaced}], tokenizer).report.notes)
    assert not encode([{"messages": [QUESTION, ANSWER]}], tokenizer).report.notes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": None, "b": {"c": None, "d": [None, {"e": None}]}}, {"b": {"d": [None, {}]}}),
        ([{"a": None}], [{}]),
        ({"a": False, "b": 0, "c": "", "d": []}, {"a": False, "b": 0, "c": "", "d": []}),
        (None, None),
    ],
)
def test_only_null_keys_of_objects_are_removed(value, expected):
    assert without_nulls(value) == expected


@pytest.mark.parametrize(
    "schema",
    [{"type": "null"}, {"type": ["string", "null"]}, {"nullable": True}, {"anyOf": [{"type": "null"}]}],
)
def test_a_null_that_the_schema_allows_is_kept(schema):
    whole = {"type": "object", "properties": {"a": schema, "b": {"type": "string"}}}
    assert without_nulls({"a": None, "b": None}, whole) == {"a": None}
    inside = {"properties": {"list": {"items": whole}}}
    assert without_nulls({"list": [{"a": None, "b": None}]}, inside) == {"list": [{"a": None}]}


@pytest.mark.parametrize(
    ("tools", "fragment"),
    [
        ([None], "tool 1 is null"),
        ([{"type": "function", "function": {"description": "x"}}], "tool 1 has no function name"),
        ([{"name": "a", "parameters": ["x"]}], "'parameters' is a list"),
        ([{"name": "a", "parameters": {"properties": ["x"]}}], "'properties' is a list"),
        ([{"name": "a", "parameters": {1, 2}}], "cannot be written as JSON"),
        ({"name": "a"}, "expected a list"),
    ],
)
def test_malformed_tools_are_refused(tools, fragment):
    with pytest.raises(DataError, match=fragment):
        read_tools(tools, "row 1")


def test_reserved_template_variables_are_refused():
    assert read_options('{"thinking": true, "style": null}', "row 1") == {"thinking": True}
    for name in ("messages", "tools", "add_generation_prompt", "strftime_now"):
        with pytest.raises(DataError, match=f"cannot contain '{name}'"):
            read_options({name: 1}, "row 1")


def test_half_surrogate_pair_is_refused_everywhere():
    with pytest.raises(DataError, match="surrogate"):
        as_json({"a": ["\ud800"]}, "row 1")


EMPTY = "<think>\n\n</think>\n\n"


def test_empty_reasoning_in_a_content_is_written_once():
    first, last = ANSWER | {"content": EMPTY + "Four."}, ANSWER | {"content": EMPTY + "Welcome."}
    expected = [f"{EMPTY}Four.<|im_end|>", f"{EMPTY}Welcome.<|im_end|>"]
    assert trained(have.QWEN3, [QUESTION, first, QUESTION, last]) == expected


def test_form_with_a_second_reasoning_is_not_used():
    template = (
        OPENED.replace("\n", "\n{{ '<think></think>' if m.role == 'assistant' }}") + "{{ m.content }}" + ENDED
    )
    refused(
        template, [QUESTION, ANSWER | {"content": "<think>Hm.</think>Noon."}], "chat template cannot write"
    )


def test_answer_at_start_without_prompt_is_context():
    answer = "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    template = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]" + answer
    messages = [ANSWER | {"content": "Welcome!"}, QUESTION, ANSWER]
    assert trained(template, messages) == [" It is noon.<|im_end|>"]
    tokenizer = have.byte_level(template)
    assert any(
        "at the start of a conversation" in note
        for note in encode([{"messages": messages}], tokenizer).report.notes
    )
    refused(template, messages[:1], "the beginning of the answer in message 1 cannot be found")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ({"names": ["Ana", "O'Neil"]}, "in Python's repr, not as JSON"),
        ({"flags": [True, None]}, "in Python's repr, not as JSON"),
        ({"a": "", "city": "B"}, "does not print the argument 'a'"),
        ({"param": {}, "city": "B"}, "does not print the argument 'param'"),
    ],
)
def test_arguments_are_not_lost_nor_written_as_pythons_repr(arguments, fragment):
    each = "{% if v %}<parameter={{ k }}>{{ v }}</parameter>{% endif %}{% endfor %}"
    parameters = "{% for k, v in c.function.arguments.items() %}" + each
    template = (
        "{{ tools | tojson if tools else '' }}"
        + OPENED
        + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call={{ c.function.name }}>"
        + parameters
        + "</call>{% endfor %}"
        + ENDED
    )
    call = {"function": {"name": "tide", "arguments": arguments}}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    refused(template, messages, fragment, tools=[{"name": "tide"}])
    call["function"]["arguments"] = {"city": "B"}
    assert trained(template, messages, tools=[{"name": "tide"}])
