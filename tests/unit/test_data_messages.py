import json

import pytest

from brushstroke.data.messages import NULLS, SPLIT, UNTRAINED, read_conversation
from brushstroke.errors import DataError

ASK = {"role": "user", "content": "When is high water?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "tide", "arguments": {"harbour": "Brest"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "parameters": {"type": "object", "properties": {"day": {"type": ["integer", "null"]}}},
    },
}


def read(*messages, **options):
    return read_conversation(list(messages), where="row 1", **options)


def answer(**fields):
    return read(ASK, {"role": "assistant", **fields}).messages[1]


def refused(messages, *fragments, **options):
    with pytest.raises(DataError) as caught:
        read_conversation(messages, where="row 1", **options)
    for fragment in ("row 1", *fragments):
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["one two", ["one ", "two"], [{"type": "text", "text": "one "}, {"text": "two", "image": None}]],
)
def test_contents_become_one_text(content):
    assert answer(content=content)["content"] == "one two"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(name):
    assert answer(content="noon", **{name: "look"})["reasoning_content"] == "look"
    parts = [{"type": name, name: "look"}, {"type": "text", "text": "noon"}]
    assert answer(content=parts) == {"role": "assistant", "content": "noon", "reasoning_content": "look"}


def test_empty_reasoning_is_dropped_and_two_different_ones_are_refused():
    assert "reasoning_content" not in answer(content="noon", reasoning_content=" ", thinking=None)
    both = {"role": "assistant", "content": "noon", "reasoning": "a", "thinking": "b"}
    refused([ASK, both], "message 2 (assistant)", "two places")


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{**CALL, "function": {"name": "tide", "arguments": '{"harbour": "Brest"}'}}]},
        {"tool_calls": [{"id": "c1", "name": "tide", "arguments": {"harbour": "Brest"}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{**CALL, "function": json.dumps(CALL["function"])}]},
    ],
)
def test_tool_calls_have_one_form(fields):
    assert answer(content=None, **fields)["tool_calls"] == [CALL]


def test_the_older_function_call_is_a_tool_call():
    (call,) = answer(content=None, function_call={"name": "tide", "arguments": "{}"})["tool_calls"]
    assert call == {"type": "function", "function": {"name": "tide", "arguments": {}}}


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        ({"function": {"name": "tide", "arguments": "{harbour"}}, "not valid JSON"),
        ({"function": {"name": "tide", "arguments": "[1]"}}, "'arguments' is a list"),
        ({"function": {"arguments": {}}}, "no function name"),
        ("tide", "is text"),
        ({"function": {"name": "tide", "arguments": {"a": {1, 2}}}}, "cannot be written as JSON"),
    ],
)
def test_malformed_calls_are_refused(call, fragment):
    refused([ASK, {"role": "assistant", "content": "", "tool_calls": [call]}], "tool call 1", fragment)


def test_calls_of_a_user_are_refused():
    refused([{**ASK, "tool_calls": [CALL]}], "only assistant messages can have them")


def test_removed_nulls_are_reported():
    filled = {"role": "assistant", "content": "noon", "name": None, "tool_calls": None, "weight": None}
    read_once = read(ASK, filled)
    assert read_once.messages[1] == {"role": "assistant", "content": "noon"}
    assert read_once.notes == (NULLS,)
    assert read(ASK, {"role": "assistant", "content": "noon"}).notes == ()


def test_null_arguments_are_left_out_unless_the_tool_may_have_them():
    arguments = {"harbour": "Brest", "day": None, "deep": {"a": None, "b": [1, None]}}
    call = {"function": {"name": "tide", "arguments": arguments}}
    messages = [ASK, {"role": "assistant", "tool_calls": [call]}]
    bare = read_conversation(messages, where="row 1").messages[1]["tool_calls"][0]["function"]["arguments"]
    assert bare == {"harbour": "Brest", "deep": {"b": [1, None]}}
    reported = read_conversation(messages, tools=[TOOL], where="row 1")
    kept = reported.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert kept == {"harbour": "Brest", "day": None, "deep": {"b": [1, None]}}


def test_tools_are_read_from_text_and_without_nulls():
    filled = {"type": "function", "function": {**TOOL["function"], "strict": None}}
    assert read(ASK, tools=[filled]).tools == (TOOL,)
    for given in (json.dumps([filled]), [json.dumps(filled)]):  # no schema has filled a text with nulls
        assert read(ASK, tools=given).tools == (filled,)
    assert read(ASK, tools="").tools == ()
    refused([ASK], "'tools' is an object", tools={"a": 1})
    refused([ASK], "tool 1 is text", tools=["clock"])


def test_options_are_read_from_text():
    assert read(ASK, options='{"enable_thinking": false}').options == {"enable_thinking": False}
    refused([ASK], "'chat_template_kwargs' is a list", options=[1])


def test_messages_may_be_json_text():
    assert read_conversation(json.dumps([ASK]), where="row 1").messages == (ASK,)


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({}, True),
        ({"weight": 1}, True),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"weight": None}, True),
    ],
)
def test_weight_and_train_keys_select_trained_messages(fields, trained):
    reported = read(ASK, {"role": "assistant", "content": "noon", **fields})
    assert reported.trained == (False, trained)
    assert (UNTRAINED in reported.notes) == (not trained)
    assert reported.messages[1] == {"role": "assistant", "content": "noon"}


@pytest.mark.parametrize(
    ("message", "fragment"),
    [
        ({"role": "assistant", "content": "noon", "weight": 0.5}, "weight 0.5"),
        ({"role": "assistant", "content": "noon", "weight": 0, "train": True}, "contradict"),
        ({**ASK, "train": True}, "only assistant messages"),
    ],
)
def test_other_weights_are_refused(message, fragment):
    refused([ASK, message], "message 2", fragment)


def test_a_result_gets_the_name_of_the_call_that_it_answers():
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "14:32"}
    assert read(ASK, calling, result).messages[2]["name"] == "tide"
    assert read(ASK, calling, {**result, "name": "own"}).messages[2]["name"] == "own"
    assert "name" not in read(ASK, calling, {**result, "tool_call_id": "c2"}).messages[2]


def test_leading_think_block_becomes_reasoning():
    reported = read(ASK, {"role": "assistant", "content": "<think>\nlook\n</think>\n\nnoon"})
    split = reported.with_thoughts_split()
    answer = {"role": "assistant", "content": "noon", SPLIT: True}
    assert split.messages[1] == {**answer, "reasoning_content": "look"}
    blank = read(ASK, {"role": "assistant", "content": "<think> </think>noon"}).with_thoughts_split()
    assert blank.messages[1] == answer
    for content in ("so <think>a</think>", "<think>a"):
        assert read(ASK, {"role": "assistant", "content": content}).with_thoughts_split() is None


CALLER = {"role": "user", "content": "Tides?"}


@pytest.mark.parametrize(
    "call",
    [
        {"name": "tide", "parameters": {"city": "Brest"}},
        {"function": {"name": "tide", "input": {"city": "Brest"}}},
        {"function": {"name": "tide", "args": '{"city": "Brest"}'}},
        {"function": {"name": "tide"}, "arguments": {"city": "Brest"}},
        {"function": "tide", "parameters": {"city": "Brest"}},
    ],
)
def test_arguments_have_one_name(call):
    (read,) = read_conversation(
        [CALLER, {"role": "assistant", "tool_calls": [call]}], where="row 1"
    ).messages[1:]
    assert read["tool_calls"][0]["function"] == {"name": "tide", "arguments": {"city": "Brest"}}


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (
            {"function": {"name": "tide", "arguments": {}, "parameters": {"a": 1}}},
            "'arguments', 'parameters'",
        ),
        ({"function": {"name": "tide", "arguments": {}, "values": {"a": 1}}}, "'values'"),
    ],
)
def test_unknown_keys_of_a_call_are_refused(call, fragment):
    with pytest.raises(DataError, match=f"tool call 1 has {fragment}"):
        read_conversation([CALLER, {"role": "assistant", "tool_calls": [call]}], where="row 1")


def test_empty_tool_calls_of_a_user_are_accepted():
    messages = [CALLER | {"tool_calls": [], "function_call": None}, {"role": "assistant", "content": "a"}]
    assert "tool_calls" not in read_conversation(messages, where="row 1").messages[0]


@pytest.mark.parametrize("key", ["training", "trainable"])
def test_other_names_of_the_train_key_are_read(key):
    messages = [CALLER, {"role": "assistant", "content": "a", key: False}]
    assert read_conversation(messages, where="row 1").trained == (False, False)
