import json

import data_tokenizers as have
import pyarrow
import pyarrow.parquet
import pytest

from brushstroke.data import DataWarning, encode, read_rows, segments
from brushstroke.data.columns import find_columns, read_prompt, read_row
from brushstroke.errors import DataError

PAIR = {"prompt": "what is the time?", "completion": "It is noon."}
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "Tells", "parameters": {}}}]
WITH_TOOLS = "{{ tools | tojson if tools else '' }}" + have.CHATML


@pytest.fixture
def chatml():
    return have.byte_level(have.CHATML)


def text_of(tokenizer, row):
    (example,) = encode([row], tokenizer)
    return tokenizer.decode(example.tokens)


def trained_of(tokenizer, row):
    (example,) = encode([row], tokenizer)
    return [tokenizer.decode(example.tokens[a:b]) for a, b, trained in segments(example) if trained]


def refused(row, tokenizer, *fragments):
    with pytest.raises(DataError) as caught:
        encode([row], tokenizer)
    for fragment in ("row 1", *fragments):
        assert fragment in str(caught.value)


def test_a_system_column_is_the_system_message(chatml):
    row = {"system": "Answer with one JSON object.", **PAIR}
    messages = [
        {"role": "system", "content": row["system"]},
        {"role": "user", "content": PAIR["prompt"]},
        {"role": "assistant", "content": PAIR["completion"]},
    ]
    assert text_of(chatml, row) == text_of(chatml, {"messages": messages})
    assert text_of(chatml, {"system": row["system"], "messages": messages[1:]}) == text_of(chatml, row)
    assert text_of(chatml, {"system": row["system"], "messages": messages}) == text_of(chatml, row)
    assert text_of(chatml, {**PAIR, "system": ""}) == text_of(chatml, PAIR)
    refused({"system": "another", "messages": messages}, chatml, "keep one of them")


@pytest.mark.parametrize("as_text", [False, True])
def test_a_history_is_context_and_not_trained(chatml, as_text):
    history = [["hello", "there"]]
    row = {"history": json.dumps(history) if as_text else history, **PAIR}
    assert "hello<|im_end|>\n<|im_start|>assistant\nthere<|im_end|>" in text_of(chatml, row)
    assert trained_of(chatml, row) == ["It is noon.<|im_end|>"]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    assert text_of(chatml, {"history": turns, **PAIR}) == text_of(chatml, row)
    refused({"history": [["a", "b", "c"]], **PAIR}, chatml, "turn 1 of 'history'")
    refused({"history": 3, **PAIR}, chatml, "'history' is a number")


def test_prompt_and_completion_may_be_messages(chatml):
    row = {
        "prompt": [{"role": "user", "content": PAIR["prompt"]}],
        "completion": [{"role": "assistant", "content": PAIR["completion"]}],
    }
    assert text_of(chatml, row) == text_of(chatml, PAIR)
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert trained_of(chatml, {**row, "prompt": [*earlier, *row["prompt"]]}) == ["It is noon.<|im_end|>"]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_are_passed_to_the_template(as_text):
    tokenizer = have.byte_level("{{ mood or '' }}" + WITH_TOOLS)
    options = {"mood": "merry "}
    row = {
        **PAIR,
        "tools": json.dumps(TOOLS) if as_text else TOOLS,
        "chat_template_kwargs": json.dumps(options) if as_text else options,
    }
    assert text_of(tokenizer, row).startswith('merry [{"type": "function"')
    assert encode([row], tokenizer).report.read_as == "prompt/completion with tools, chat_template_kwargs"


def test_tools_that_a_template_does_not_print_are_refused(chatml):
    refused({**PAIR, "tools": TOOLS}, chatml, "does not print the tools", "'clock'")


@pytest.mark.parametrize("column", ["system", "history", "tools"])
def test_context_without_a_template_is_refused(column):
    row = {**PAIR, column: {"system": "a", "history": [["a", "b"]], "tools": TOOLS}[column]}
    refused(row, have.byte_level(), f"the column {column!r} cannot be written", "--chat-template")


def test_unused_columns_are_named_and_empty_ones_are_not(chatml):
    rows = [{**PAIR, "source": "web", "empty": None}, {**PAIR, "source": None, "empty": None}]
    report = encode(rows, chatml).report
    assert report.unused_columns == ("source",)
    assert report.reading == "prompt/completion; not used: source"


def test_unused_keys_of_messages_are_named(chatml):
    asked = {"role": "user", "content": "a", "date": "today", "name": "Ann"}
    report = encode([{"messages": [asked, {"role": "assistant", "content": "b"}]}], chatml).report
    assert report.unused_keys == ("date", "name")
    assert report.reading == "messages; not used: date (of messages), name (of messages)"


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"text": "hello there, you", "answer": "hi"}, ("'answer'", "looks like an answer")),
        ({**PAIR, "label": False}, ("'label'", "including 1 of 1 rows where it is negative")),
        ({**PAIR, "label": "false"}, ("including 1 of 1",)),
        ({**PAIR, "label": True}, ("looks like a rating",)),
        ({**PAIR, "chosen": "x"}, ("'chosen'",)),
        ({**PAIR, "response": "x"}, ("what is trained is 'completion'",)),
    ],
)
def test_unused_column_that_looks_like_answer_or_rating_is_a_warning(chatml, row, fragments):
    with pytest.warns(DataWarning) as caught:
        encode([row], chatml)
    for fragment in fragments:
        assert any(fragment in str(one.message) for one in caught), [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("fields", "fragments"),
    [
        ({"label": False}, ("the key 'label'", "a rating", '"weight": 0')),
        ({"rating": 1}, ("the key 'rating'", "a rating")),
        ({"response": "noon"}, ("the key 'response'", "an answer", "'content'")),
    ],
)
def test_unused_message_key_that_looks_like_answer_or_rating_is_a_warning(chatml, fields, fragments):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "noon", **fields}]
    with pytest.warns(DataWarning) as caught:
        encode([{"messages": messages}], chatml)
    for fragment in fragments:
        assert fragment in str(caught[0].message)


def test_answers_without_a_text_are_noted_with_their_rows(chatml):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}]
    (note,) = encode(rows, chatml).report.notes
    assert "only the end is trained (rows 2)" in note
    assert not encode(rows[:1], chatml).report.notes


def test_conversation_column_with_other_name_gets_a_hint(chatml):
    row = {"dialog": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    refused(row, chatml, "'dialog' contains objects", "read from 'messages'", "expected 'messages'")


def test_nulls_added_by_parquet_are_not_trained(tmp_path):
    calls = [{"function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]},
        {"messages": [{"role": "user", "content": "now?"}, {"role": "assistant", "tool_calls": calls}]},
    ]
    rows[0]["messages"][1]["tool_calls"] = [{"function": {"name": "bell", "arguments": {"times": 2}}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    filled = read_rows(tmp_path / "rows.parquet").rows
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"zone": None, "times": 2}
    columns = find_columns(read_rows(tmp_path / "rows.parquet"))
    read = [read_row(row, columns, "row").messages[1]["tool_calls"][0]["function"] for row in filled]
    assert [call["arguments"] for call in read] == [{"times": 2}, {"zone": "UTC"}]
    assert not any("None" in json.dumps(call) or "null" in json.dumps(call) for call in read)


def test_prompts_of_a_file_are_texts_or_conversations():
    assert read_prompt({"prompt": "a"}, "row 1") == "a"
    reported = read_prompt({"prompt": "a", "system": "b"}, "row 1")
    assert [message["role"] for message in reported.messages] == ["system", "user"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    asked = read_prompt({"messages": turns, "tools": TOOLS}, "row 1")
    assert asked.messages == ({"role": "user", "content": "a"},)
    assert asked.tools == tuple(TOOLS)
    with pytest.raises(DataError, match="expected a 'messages' or 'prompt' column"):
        read_prompt({"text": "a"}, "row 1")
