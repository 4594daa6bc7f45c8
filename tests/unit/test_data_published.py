import gzip
import json

import data_tokenizers as have
import pytest

from brushstroke.data import DataWarning, encode, hold_out, read_rows, segments
from brushstroke.data.columns import find_columns
from brushstroke.errors import DataError

QUESTION, ANSWER = "what is the time?", "It is noon."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
TURNS = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
TOOLS = [{"type": "function", "function": {"name": "clock", "description": "Tells", "parameters": {}}}]
WITH_TOOLS = "{{ tools | tojson if tools else '' }}" + have.CHATML
SYSTEM = {"role": "system", "content": "Be brief."}


def text_of(tokenizer, row, **options):
    """The texts of all examples of a row, with the trained parts in brackets."""
    texts = []
    for example in encode(read_rows([row], **options), tokenizer):
        parts = [(tokenizer.decode(example.tokens[a:b]), trained) for a, b, trained in segments(example)]
        texts.append("".join(f"[{part}]" if trained else part for part, trained in parts))
    return texts


@pytest.fixture
def chatml():
    return have.byte_level(have.CHATML)


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("alpaca", {"instruction": QUESTION, "input": "", "output": ANSWER}),
        ("alpaca", {"instruction": QUESTION, "output": ANSWER, "text": "### Instruction: ..."}),
        ("alpaca", {"instruction": QUESTION, "input": None, "output": ANSWER}),
        ("dolly", {"instruction": QUESTION, "context": "", "response": ANSWER, "category": "qa"}),
        ("question/answer", {"question": QUESTION, "answer": ANSWER}),
        ("question/response", {"question": QUESTION, "response": ANSWER}),
        ("query/response", {"query": QUESTION, "response": ANSWER}),
        ("prompt/response", {"prompt": QUESTION, "response": ANSWER}),
        ("input/output", {"input": QUESTION, "output": ANSWER}),
        ("sharegpt", {"id": "a1", "conversations": TURNS}),
        ("sharegpt", {"conversations": json.dumps(TURNS)}),
        ("sharegpt", {"conversation": MESSAGES}),
        ("sharegpt", {"conversations": [{**TURNS[0], "from": "user"}, {**TURNS[1], "from": "assistant"}]}),
        (
            "instructions with instances",
            {"id": "s", "instruction": QUESTION, "instances": [{"input": "", "output": ANSWER}]},
        ),
    ],
)
def test_a_published_form_is_named_and_read_like_messages(chatml, form, row):
    assert text_of(chatml, row) == text_of(chatml, {"messages": MESSAGES})
    rows = read_rows([row])
    assert find_columns(rows).read_as == form
    assert encode([row], chatml).report.read_as == form


def test_the_input_of_alpaca_follows_the_instruction(chatml):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    asked = {"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]}
    assert text_of(chatml, row) == text_of(chatml, asked)
    dolly = {"instruction": "Add.", "context": "1 2", "response": "3"}
    assert text_of(chatml, dolly) == text_of(chatml, asked)


def test_system_and_history_of_alpaca_are_read(chatml):
    row = {
        "system": "Be brief.",
        "history": [["hello", "there"]],
        "instruction": QUESTION,
        "input": "",
        "output": ANSWER,
    }
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there", "weight": 0}]
    assert text_of(chatml, row) == text_of(chatml, {"messages": [SYSTEM, *earlier, *MESSAGES]})
    assert encode([row], chatml).report.read_as == "alpaca with system, history"


def test_tool_calls_of_sharegpt_become_calls_and_results():
    tokenizer = have.byte_level(WITH_TOOLS)
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    row = {
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": ANSWER},
        ],
    }
    (converted,) = read_rows([row]).rows
    assert converted["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": ANSWER},
    ]
    assert converted["tools"] == row["tools"]
    with pytest.raises(DataError, match="row 1: turn 2: the function call is not valid JSON"):
        read_rows([{"conversations": [TURNS[0], {"from": "function_call", "value": "clock()"}]}])
    with pytest.raises(DataError, match="row 1: turn 1 is from 'narrator'; known: human"):
        read_rows([{"conversations": [{"from": "narrator", "value": "x"}]}])
    with pytest.raises(DataError, match=r"row 1: turn 1 \(human\) has no value"):
        encode([{"conversations": [{"from": "human"}, TURNS[1]]}], tokenizer)


def test_every_instance_of_an_instruction_is_an_example(chatml):
    instances = [{"input": "1 2", "output": "3"}, {"input": "2 3", "output": "5"}]
    second = {"instruction": "Name one.", "instances": [{"input": "", "output": "one"}]}
    rows = read_rows([{"id": "s", "instruction": "Add.", "instances": instances}, second])
    assert [row["completion"] for row in rows.rows] == ["3", "5", "one"]
    assert rows.where(2) == "the given rows, row 1, instance 2"
    assert rows.where(3) == "the given rows, row 2"
    (note,) = encode(rows, chatml).report.notes
    assert note == "2 rows contain 3 instances; row numbers count instances"
    with pytest.raises(DataError, match="row 1: instance 1 has no 'output'"):
        read_rows([{"instruction": "Add.", "instances": [{"input": ""}]}])


PAIRS = [
    {"prompt": QUESTION, "chosen": ANSWER, "rejected": "no"},
    {"question": QUESTION, "chosen": ANSWER, "rejected": "no"},
    {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]},
    {"prompt": QUESTION, "chosen": MESSAGES, "rejected": MESSAGES, "score_chosen": 8.0},
    {"chosen": MESSAGES, "rejected": MESSAGES},
    {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
    {"chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}", "rejected": "\n\nHuman: a\n\nAssistant: b"},
    {
        "input": {"messages": MESSAGES[:1]},
        "preferred_output": MESSAGES[1:],
        "non_preferred_output": MESSAGES[1:],
    },
]


@pytest.mark.parametrize("row", PAIRS)
@pytest.mark.filterwarnings("error")
def test_preferences_train_the_chosen_answer_only_if_asked(chatml, row):
    with pytest.raises(DataError, match=r"pairs of a chosen and a rejected answer; .*--use chosen"):
        read_rows([row])
    assert text_of(chatml, row, use="chosen") == text_of(chatml, {"messages": MESSAGES})
    assert "rejected" in str(encode(read_rows([row], use="chosen"), chatml).report.unused_columns) or (
        "non_preferred_output" in row
    )


def test_only_the_last_answer_of_a_chosen_conversation_is_trained(chatml):
    whole = [*MESSAGES, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "One."}]
    (text,) = text_of(chatml, {"chosen": whole, "rejected": whole}, use="chosen")
    assert text.count("[") == 1
    assert "[One.<|im_end|>]" in text


def test_wrong_uses_are_refused():
    row = {"instruction": QUESTION, "output": ANSWER}
    with pytest.raises(DataError, match=r"cannot use 'choosen' .did you mean 'chosen'"):
        read_rows([row], use="choosen")
    with pytest.raises(DataError, match="is read as alpaca, which has no chosen answers"):
        read_rows([row], use="chosen")
    with pytest.raises(DataError, match="'chosen' is not an answer to a prompt"):
        read_rows([{"chosen": "a", "rejected": "b"}], use="chosen")


@pytest.mark.parametrize("label", ["label", "category", "intent"])
def test_texts_with_a_label_are_refused_until_the_user_chooses(chatml, label):
    row = {"text": QUESTION, label: "time"}
    with pytest.raises(DataError, match=rf"--prompt text --completion {label}.*--use text"):
        encode([row], chatml)
    classified = encode([row], chatml, prompt_column="text", completion_column=label)
    assert classified.report.read_as == "prompt/completion"
    assert text_of(chatml, row, use="text") == text_of(chatml, {"text": QUESTION})


def test_a_mixture_of_forms_is_refused_with_its_rows():
    alpaca = {"instruction": QUESTION, "output": ANSWER}
    rows = [alpaca, alpaca, {"conversations": TURNS}, alpaca, alpaca, alpaca]
    expected = (
        r"mixes rows of several forms: alpaca \(the given rows, row 1; the given rows, row 2; "
        r"the given rows, row 4 and 2 more\), sharegpt \(the given rows, row 3\)"
    )
    with pytest.raises(DataError, match=expected):
        read_rows(rows)
    with pytest.raises(DataError, match=r"row 2: has no 'output', which rows of the form alpaca have"):
        read_rows([alpaca, {"instruction": QUESTION, "input": "x"}])


@pytest.mark.filterwarnings("ignore:.*'input' is not used")
def test_selected_columns_are_not_converted(chatml):
    row = {"instruction": QUESTION, "input": "ignored", "output": ANSWER}
    encoded = encode([row], chatml, prompt_column="instruction", completion_column="output")
    assert encoded.report.read_as == "prompt/completion"
    assert encoded.report.unused_columns == ("input",)


ROWS = [{"instruction": f"{QUESTION} {n}", "output": ANSWER} for n in range(3)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({"version": "1", "data": ROWS})),
        ("a.json", json.dumps({"tags": [], "rows": ROWS})),
        ("a.tsv", "instruction\toutput\n" + "".join(f"{r['instruction']}\t{r['output']}\n" for r in ROWS)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_of_other_kinds_have_the_same_rows(tmp_path, name, content, packed):
    plain = read_rows(ROWS)
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    found = read_rows(path)
    assert (found.rows, found.hash, found.form) == (plain.rows, plain.hash, "alpaca")
    assert found.where(2) == f"{path}, row 2"


def test_a_field_of_a_tsv_file_is_unquoted_only_if_it_is_quoted_as_a_whole(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('question\tanswer\n"Go" he said\tok\n')
    assert read_rows(path).rows[0]["prompt"] == '"Go" he said'
    path.write_text('question\tanswer\n"He said ""hi"""\t5" disk\n"Hi\tyes\nno"\tok\n')
    assert [tuple(row.values()) for row in read_rows(path).rows] == [
        ('He said "hi"', '5" disk'),
        ('"Hi', "yes"),
        ('no"', "ok"),
    ]
    path.write_text('question\tanswer\n"two\nlines"\tok\n')
    assert read_rows(path).rows[0]["prompt"] == "two\nlines"


def test_damaged_and_ambiguous_files_are_refused(tmp_path):
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode())[:-6])
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
        read_rows(packed)
    splits = tmp_path / "b.json"
    splits.write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(DataError, match=r"contains the splits 'train', 'test'"):
        read_rows(splits)
    splits.write_text(json.dumps(ROWS[0], indent=1))
    with pytest.raises(DataError, match=r"contains one object; .* put the rows between \[ and \]"):
        read_rows(splits)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["trainset.jsonl", "devset.jsonl", "testset_w_refs.jsonl"], ["trainset.jsonl"]),
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl"], 2),
        (["a.jsonl", "test.jsonl"], 2),
        (["squad_train.jsonl", "squad_test.jsonl", "holdout.jsonl"], ["squad_train.jsonl"]),
        (["training.jsonl", "more.jsonl", "valid.jsonl"], 2),
        (["testimony.jsonl", "train.jsonl"], 2),
    ],
)
def test_a_folder_with_splits_is_read_as_its_train_split(tmp_path, chatml, names, read):
    for name in names:
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
    rows = read_rows(tmp_path)
    assert len(rows) == (read if isinstance(read, int) else len(read))
    left = [name for name in names if all(name not in file for file, _ in rows.files)]
    notes = encode(rows, chatml).report.notes
    kept = ", ".join(sorted(name for name in names if name not in left))
    said = f"read {kept}; not read, because they are other splits: {', '.join(sorted(left))}"
    assert notes == ((said,) if left else ())


def test_a_data_folder_inside_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert len(read_rows(tmp_path)) == 1


def test_transcripts_may_end_with_the_name_of_the_assistant(chatml):
    row = {"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:", "chosen": f" {ANSWER}", "rejected": "x"}
    (converted,) = read_rows([row], use="chosen").rows
    assert [turn["role"] for turn in converted["prompt"]] == ["user"]


def test_a_chosen_conversation_is_joined_with_the_prompt_where_it_repeats_it():
    def read(prompt, chosen):
        (row,) = read_rows([{"prompt": prompt, "chosen": chosen, "rejected": chosen}], use="chosen").rows
        return [*row["prompt"], *row["completion"]]

    assert read([SYSTEM, MESSAGES[0]], MESSAGES) == [SYSTEM, *MESSAGES]
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read([*earlier, MESSAGES[0]], MESSAGES) == [*earlier, *MESSAGES]
    assert read(f" {QUESTION}\n", MESSAGES)[1:] == MESSAGES[1:]
    with pytest.raises(DataError, match="does not begin with the prompt"):
        read("another question", MESSAGES)


def test_the_input_of_a_preference_pair_follows_the_instruction():
    row = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    (converted,) = read_rows([row], use="chosen").rows
    assert converted["prompt"] == [{"role": "user", "content": "Add.\n\n1 2"}]


def test_columns_whose_names_are_taken_are_named_as_unused(chatml):
    row = {"prompt": "You are Bob.", "question": QUESTION, "answer": ANSWER}
    with pytest.warns(DataWarning, match="'prompt of the file' is not used"):
        report = encode([row], chatml).report
    assert report.unused_columns == ("prompt of the file",)
    with pytest.warns(DataWarning, match="'text' is not used, but looks like a part of the conversation"):
        encode([{"text": "a passage", "question": QUESTION, "answer": ANSWER}], chatml)
    assert text_of(chatml, {"instruction": QUESTION, "output": ANSWER, "messages": None}) == text_of(
        chatml, {"messages": MESSAGES}
    )


def test_instances_share_only_the_columns_of_their_row():
    instances = [{"input": "", "output": "a", "system": "Be rude."}, {"input": "", "output": "b"}]
    rows = read_rows([{"instruction": "x", "instances": instances}]).rows
    assert [row.get("system") for row in rows] == ["Be rude.", None]
    with pytest.raises(DataError, match="'instances' is empty"):
        read_rows([{"instruction": "x", "instances": []}])


def test_rows_without_the_value_of_their_form_are_refused():
    with pytest.raises(DataError, match="row 2: has no 'conversations'"):
        read_rows([{"conversations": TURNS}, {"conversations": None}])
    with pytest.raises(DataError, match="cannot be combined with selected columns"):
        read_rows([{"text": "a", "label": "b"}], prompt="text", use="text")
    with pytest.raises(DataError, match="is read as alpaca, not as texts"):
        read_rows([{"instruction": "a", "output": "b"}], use="text")
    assert read_rows([{"text": "a", "label": ""}]).rows[0]["text"] == "a"


def test_preferences_of_two_kinds_in_one_source_are_all_converted():
    rows = read_rows([PAIRS[0], PAIRS[-1]], use="chosen").rows
    assert [row["completion"][-1]["content"] for row in rows] == [ANSWER, ANSWER]


@pytest.mark.parametrize("name", ["train", "quality", "rating", "skip"])
def test_judgements_of_plain_texts_are_still_warned_of(chatml, name):
    with pytest.warns(DataWarning, match=f"the column '{name}' is not used"):
        encode([{"text": QUESTION, name: False}], chatml)


def test_bad_rows_after_holding_out_have_the_numbers_of_the_file(chatml):
    rows = [{"prompt": f"p{n}", "completion": "c"} for n in range(30)]
    for number in range(20, 28):
        rows[number]["completion"] = 5
    train, _ = hold_out(read_rows(rows), 0.3)
    kept = [train.number(n) for n in range(1, len(train) + 1) if train.rows[n - 1]["completion"] == 5]
    with pytest.raises(DataError, match=rf"row {kept[0]}: .*in rows {', '.join(map(str, kept[1:]))}\)"):
        encode(train, chatml)
