import dataclasses

import data_tokenizers as have
import numpy as np
import pytest

from brushstroke.data import DataWarning, EncodedData, Example, encode, read_rows, segments
from brushstroke.errors import ConfigError, DataError

PAIRS = [{"prompt": "what is the time?", "completion": "It is noon."}, {"prompt": "hello", "completion": ""}]


@pytest.fixture
def chatml():
    return have.byte_level(have.CHATML)


@pytest.fixture
def plain():
    return have.byte_level()


def trained_texts(tokenizer, example):
    return [tokenizer.decode(example.tokens[a:b]) for a, b, trained in segments(example) if trained]


def refused(source, tokenizer, *fragments, **options):
    with pytest.raises(DataError) as caught:
        encode(source, tokenizer, **options)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    return message


def test_examples_check_themselves():
    example = Example(tokens=(1, 2, 3), weights=(0.0, 0.0, 0.5))
    assert (example.trained, example.first_target, len(example)) == (1, 2, 3)
    assert Example((1, 2), (0.0, 0.0)).first_target == 2
    assert segments(Example((), ())) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.row = 2
    for tokens, weights, reason in [
        ((1, 2), (0.0,), "2 tokens and 1 weights"),
        ((1, 2), (1.0, 1.0), "nothing predicts"),
        ((1, 2), (0.0, float("nan")), "finite"),
    ]:
        with pytest.raises(DataError, match=reason):
            Example(tokens, weights)


def test_pairs_are_a_user_and_an_assistant_turn_where_there_is_a_template(chatml):
    data = encode(PAIRS, chatml)
    messages = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in PAIRS
    ]
    assert data.examples == encode(messages, chatml).examples
    assert [trained_texts(chatml, example) for example in data] == [["It is noon.<|im_end|>"], ["<|im_end|>"]]
    assert data.report.kind == "prompt/completion"
    assert data.report.stop_tokens == ("<|im_end|>",)


def test_pairs_without_a_template_are_joined_and_ended(plain):
    example = encode(PAIRS, plain)[0]
    prompt, completion = (plain(text)["input_ids"] for text in PAIRS[0].values())
    assert list(example.tokens) == [*prompt, *completion, plain.eos_token_id]
    assert example.first_target == len(prompt)
    assert example.roles == {"prompt": len(prompt), "completion": len(completion) + 1}


def test_begin_token_is_used_only_if_the_tokenizer_adds_it(plain):
    begins = have.byte_level(adds_bos=True)
    with_begin, without = (encode(PAIRS, tokenizer)[0].tokens for tokenizer in (begins, plain))
    assert with_begin == (begins.bos_token_id, *without)


def test_completion_gets_no_leading_space():
    tokenizer = have.sentencepiece_like()
    example = encode([{"prompt": "hello", "completion": " there"}], tokenizer)[0]
    assert list(example.tokens) == [*tokenizer("hello there")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("begins", [True, False])
def test_texts_are_trained_in_full_with_begin_and_end_tokens(begins):
    tokenizer = have.byte_level(have.CHATML, adds_bos=begins)
    data = encode([{"text": "hello there"}], tokenizer)
    (example,) = data
    whole = tokenizer("hello there")["input_ids"]
    assert list(example.tokens) == [*whole, tokenizer.eos_token_id]
    assert example.weights == (0.0, *(1.0,) * len(whole))
    assert data.report.kind == "text"
    assert data.report.begin_tokens == (("<|begin|>",) if begins else ())
    assert data.report.stop_tokens == ("<|im_end|>",)


def test_tokenizer_without_end_token_is_a_warning(plain):
    plain.eos_token = None
    for row in ({"text": "hello there, what is the time?"}, PAIRS[0]):
        with pytest.warns(DataWarning, match="no end token"):
            data = encode([row], plain)
        assert data.report.stop_tokens == ()


def test_messages_come_before_pairs_and_pairs_before_texts(chatml):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"text": "t", **PAIRS[0], "messages": messages}
    kinds = []
    for name in ("messages", "completion"):
        kinds.append(encode([row], chatml).report.kind)
        row = {key: value for key, value in row.items() if key != name}
    assert kinds == ["messages", "prompt/completion"]
    with pytest.warns(DataWarning, match="'prompt' is not used, but looks like a part of the conversation"):
        assert encode([row], chatml).report.kind == "text"


def test_other_columns_can_be_named(plain):
    rows = [{"question": row["prompt"], "completion": row["completion"], "text": "x"} for row in PAIRS]
    assert encode(rows, plain, prompt_column="question").examples == encode(PAIRS, plain).examples
    rows = [{"question": row["prompt"], "answer": row["completion"], "messages": None} for row in PAIRS]
    named = encode(rows, plain, prompt_column="question", completion_column="answer")
    assert named.examples == encode(PAIRS, plain).examples
    refused(rows, plain, "row 1", "'antwort'", "found the columns 'question'", completion_column="antwort")


def test_files_lists_and_read_rows_give_the_same(plain, tmp_path):
    import datasets

    path = tmp_path / "train.csv"
    path.write_text("prompt,completion\nwhat is the time?,It is noon.\nhello,\n")
    data = [
        encode(source, plain) for source in (path, PAIRS, datasets.Dataset.from_list(PAIRS), read_rows(path))
    ]
    assert all(each.examples == data[0].examples and each.hash == data[0].hash for each in data)
    assert data[0].name == "train.csv"
    assert data[0][1].row == 2
    assert isinstance(data[0], EncodedData)
    assert data[0][:1] == data[0].examples[:1]


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"prompt": "a"}, ("'completion'", "found the columns 'prompt'")),
        ({"prompt": "a", "completionn": "b"}, ("'completionn': did you mean 'completion'?",)),
        ({"prompt": None, "completion": "b"}, ("'prompt' is null", "expected text")),
        ({"prompt": "a", "completion": 5}, ("'completion' is a number (5)", "expected text")),
        ({"prompt": "a", "completion": ["b"]}, ("'completion' is a list", "expected text")),
        ({"prompt": "a", "completion": True}, ("'completion' is a boolean (true)",)),
        ({"prompt": "a", "completion": "\udfff"}, ("'completion'", "surrogate")),
        ({}, ("found the columns none",)),
    ],
)
@pytest.mark.parametrize("template", [None, have.CHATML])
def test_a_bad_row_is_named(row, fragments, template):
    refused([PAIRS[0], row, PAIRS[1]], have.byte_level(template), "row 2", *fragments)


def test_unknown_columns_error_lists_possible_columns(plain):
    rows = [{"instruction": "a", "mesages": []}]
    refused(
        rows,
        plain,
        "row 1",
        "'instruction', 'mesages'",
        "'prompt' and 'completion'",
        "'mesages': did you mean 'messages'?",
    )


def test_one_error_lists_all_bad_rows(plain):
    message = refused([{"text": None}, {"text": "a"}, {"text": 3}], plain, "row 1", "rows 3")
    assert "more" not in message
    refused([{"text": None}] * 50, plain, "rows 2, 3, 4, 5, 6, 7, 8, 9, 10, more")


def test_bad_rows_of_a_file_carry_its_name(plain, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n')
    refused(path, plain, "train.jsonl, row 2", "null")


def test_a_completion_beyond_the_limit_is_cut_trained_and_reported(plain):
    rows = [*PAIRS, {"prompt": "hello", "completion": "there " * 30}]
    whole = encode(rows, plain)
    data = encode(rows, plain, max_length=20)
    assert data[:2] == whole[:2]
    assert data[2].tokens == whole[2].tokens[:20]
    assert data[2].cut == len(whole[2]) - 20
    assert data[2].trained == 20 - data[2].first_target
    assert sum(data[2].roles.values()) == 20
    assert (data.report.cut_rows, data.report.cut_tokens) == ((3,), data[2].cut)
    assert data.report.real_tokens == sum(map(len, data))
    assert data.report.trained_tokens == sum(example.trained for example in data)


def test_untrained_tokens_beyond_the_limit_do_not_count_as_cut(chatml):
    whole = encode(PAIRS[:1], chatml)
    data = encode(PAIRS[:1], chatml, max_length=len(whole[0]) - 1)
    assert data[0].trained == whole[0].trained
    assert data.report.cut_rows == ()
    assert sum(data[0].roles.values()) == len(data[0])


def test_prompts_that_fill_the_limit_are_refused_with_their_rows(plain):
    rows = [PAIRS[0], *({"prompt": "hello " * 40, "completion": "a"} for _ in range(12)), PAIRS[1]]
    message = refused(rows, plain, "12 rows", "12 tokens", "and 2 more", "--skip-too-long", max_length=12)
    assert "the given rows, rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more" in message
    data = encode(rows, plain, max_length=12, skip_too_long=True)
    assert [example.row for example in data] == [1, 14]
    assert data.report.skipped_rows == tuple(range(2, 14))
    assert (data.report.rows, data.report.examples) == (14, 2)
    needed = int(message.split("(--max-length) to ")[1].split()[0])
    assert len(encode(rows, plain, max_length=needed)) == 14


def test_rows_without_a_trained_token_are_refused_when_there_is_nothing_else(plain):
    refused([{"input_ids": [1, 2], "labels": [-100, -100]}], None, "nothing to train on", "row 1")
    refused([{"text": ""}], plain, "nothing to train on")
    rows = [{"prompt": "hello " * 40, "completion": "a"}]
    refused(rows, plain, "has a token to train", "raise max_length", max_length=4, skip_too_long=True)
    assert encode(rows, plain, max_length=4, need_trained=False).report.trained_tokens == 0


def test_questions_without_an_answer_can_be_read_where_nothing_is_trained(chatml):
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    refused(rows, chatml, "row 1", "no assistant turn")
    assert encode(rows, chatml, need_trained=False)[0].trained == 0


def test_too_small_max_length_is_a_config_error(plain):
    with pytest.raises(ConfigError, match="max_length is 1"):
        encode(PAIRS, plain, max_length=1)


def test_tokenised_examples_are_used_unchanged():
    examples = [Example((5, 6, 7), (0.0, 0.0, 2.0)), Example((5, 6), (0.0, 1.0), row=9)]
    data = encode(examples, None)
    assert data[0].weights == (0.0, 0.0, 2.0)
    assert [example.row for example in data] == [1, 9]
    assert data.report.kind == "tokens"
    assert encode(iter(examples), None).hash == data.hash
    assert encode(data, None).examples == data.examples
    assert encode(examples[:1], None).hash != data.hash
    refused([examples[0], {"text": "a"}], None, "row 2", "either rows or examples")


def test_labels_of_other_libraries_are_understood():
    row = {"input_ids": [5, 6, 7, 8, 0, 0], "labels": [5, -100, 7, 8, -100, -100], "text": "ignored"}
    (example,) = encode([row], None)
    assert example.weights == (0.0, 0.0, 1.0, 1.0, 0.0, 0.0)
    (masked,) = encode([{**row, "attention_mask": [1, 1, 1, 1, 0, 0]}], None)
    assert (masked.tokens, masked.weights) == ((5, 6, 7, 8), (0.0, 0.0, 1.0, 1.0))
    (from_arrays,) = encode([{name: np.array(row[name]) for name in ("input_ids", "labels")}], None)
    assert from_arrays.tokens == example.tokens
    (weighted,) = encode([{**row, "weights": [1, 1, 0.5, 2, 1, 1]}], None)
    assert weighted.weights == (0.0, 0.0, 0.5, 2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"input_ids": [5, 6], "labels": [6, 7]}, ("labels[0] is 6", "do not shift")),
        ({"input_ids": [5, 6], "labels": [5]}, ("input_ids has 2, labels has 1",)),
        ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1]}, ("attention_mask has 1",)),
        ({"input_ids": "56", "labels": [5]}, ("'input_ids' is text",)),
        ({"input_ids": [5, 6.5], "labels": [5, 6]}, ("input_ids[1] is 6.5",)),
        ({"input_ids": [5, -100], "labels": [5, -100]}, ("input_ids[1] is -100",)),
        ({"input_ids": [5, None], "labels": [5, 6]}, ("input_ids[1] is null",)),
        ({"input_ids": [5, 6], "labels": [5, 6], "weights": [1, float("inf")]}, ("finite",)),
    ],
)
def test_bad_tokens_are_refused_with_the_row(row, fragments):
    good = {"input_ids": [5, 6], "labels": [-100, 6]}
    refused([good, row], None, "row 2", *fragments)


def test_text_without_a_tokenizer_is_refused():
    refused([{"text": "a"}], None, "no tokenizer", "input_ids")
